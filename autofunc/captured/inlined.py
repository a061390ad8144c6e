"""An exported graph with its regions, such as those under no_grad, inlined."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from autofunc.captured.module_names import RegisteredNames
from autofunc.errors import ModelError
from autofunc.graph.lines import line_of
from autofunc.graph.schema import is_operator

Node = fx.Node

PREFIX = "module."
"""The prefix that the exported call puts before the names of a module's parts."""

_aten = torch.ops.aten

_RESHAPED_IN_PLACE: dict[Any, Any] = {
    _aten.squeeze_.default: _aten.squeeze.default, _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.squeeze_.dims: _aten.squeeze.dims, _aten.unsqueeze_.default: _aten.unsqueeze.default,
    _aten.t_.default: _aten.t.default, _aten.transpose_.default: _aten.transpose.int,
    _aten.swapaxes_.default: _aten.swapaxes.default, _aten.swapdims_.default: _aten.swapdims.default,
}  # fmt: skip
"""These write no values: they change a tensor's shape, as a view would have it."""


class Inliner:
    """Copies a graph, with its no-grad and autocast regions inlined."""

    def __init__(self, root: fx.GraphModule, module: nn.Module) -> None:
        self.root, self.names = root, RegisteredNames(module)
        self.graph = fx.Graph()
        self.values: dict[Node, Any] = {}  # old node -> its new one, or a tuple of them, or a constant

    def placeholder(self, node: Node) -> Node:
        """Copy a placeholder."""
        new = self.graph.placeholder(node.name)
        new.meta["val"] = node.meta["val"]
        self.values[node] = new
        return new

    def run(
        self, graph: fx.Graph, modes: tuple[tuple[Any, ...], ...] = (), owner: fx.GraphModule | None = None
    ) -> list[Any]:
        """Copy the operators of a graph; return the new nodes, or constants, of what it returns."""
        owner = owner or self.root
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return [self.values[leaf] if isinstance(leaf, Node) else leaf for leaf in node.args[0]]
            if node.op == "get_attr":
                self.values[node] = getattr(owner, str(node.target))
            elif node.op == "call_function":
                self._call(node, modes)
            else:
                raise ModelError(f"a captured graph has a node of kind {node.op} ({node.target}), which cannot be split")
        raise AssertionError("a graph ends in an output")

    def _call(self, node: Node, modes: tuple[tuple[Any, ...], ...]) -> None:
        name = str(node.target)
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            count = 1 if name == "wrap_with_set_grad_enabled" else 4
            options, body, operands = node.args[:count], self.values[node.args[count]], node.args[count + 1 :]  # type: ignore[index]
            mode = ("grad" if count == 1 else "autocast", *options)
            inner = [each for each in body.graph.nodes if each.op == "placeholder"]
            self.values.update(zip(inner, map(self._value, operands), strict=True))
            self.values[node] = tuple(self.run(body.graph, (*modes, mode), body))
            return
        if node.target is operator.getitem and isinstance(self.values[node.args[0]], tuple):  # type: ignore[index]
            self.values[node] = self.values[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        if "functorch" in str(getattr(node.target, "__module__", "")):
            raise ModelError(
                f"a transform of torch.func, such as grad, cannot be split over stages ({line_of(node)}); write it with "
                "operators"
            )
        if not is_operator(node) and node.target is not operator.getitem:
            raise ModelError(f"{name} cannot be split over stages ({line_of(node)}); write forward without it")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda read: self.values[read])
        reshaped = _RESHAPED_IN_PLACE.get(node.target)
        new = self.graph.call_function(reshaped or node.target, args, kwargs)  # type: ignore[arg-type]
        stack = (node.meta.get("nn_module_stack") or {}).items()
        new.meta.update(
            val=node.meta.get("val"),
            modules=[(key, part) for key, (path, _) in stack if (part := self._name(path))],
            modes=modes,
            stack_trace=node.meta.get("stack_trace", ""),
        )
        if reshaped is not None:  # later readers of the tensor see the new shape
            self.values.update({old: new for old, value in self.values.items() if value is args[0]})
        self.values[node] = new

    def _name(self, path: str) -> str | None:
        return self.names.of(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.values[node])
