"""Functional forms of in-place writes to values that need weights, so that the graph can be cut between the writes.

`x += block(x)` becomes `x1 = x + block(x)`, and later reads of `x` read `x1`; a write to a part (`out[:, n] = x`) becomes a
new whole with that part. Views made before a write and read after it are recreated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.captured.flow import Flow
from autofunc.graph.memory import aliased, base_of, storages, written
from autofunc.graph.schema import arguments, name_of, without_out

Node = fx.Node

_aten = torch.ops.aten

_SAME = (_aten.detach.default, _aten.alias.default)
_CONVERTED = ("to", "type_as")
_RESHAPED = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "view_as")


def make_functional(flow: Flow) -> bool:
    """Rewrite, in place, the writes to values that need weights; return whether there were any."""
    changed = False
    bases = [base for base in flow.writes if base.op == "call_function" and base in flow.weighted]
    for base, family in families(flow.exported.graph, bases).items():
        changed |= rewrite(flow.exported.graph, base, family) is not None
    if changed:
        flow.exported.graph.lint()
    return changed


def families(graph: fx.Graph, bases: Iterable[Node]) -> dict[Node, set[Node]]:
    """Return, by base, the base and all nodes that lie in its memory. Rewriting one family leaves the others unchanged."""
    found = {base: {base} for base in bases}
    for node in graph.nodes if found else ():
        base = base_of(node)
        # nodes whose schema says they may share memory, and that did
        if base in found and node.op == "call_function" and storages(node) & storages(base):
            found[base].add(node)
    return found


def rewrite(graph: fx.Graph, base: Node, family: set[Node], *, gradients: bool = True) -> Node | None:
    """Rewrite all writes to one memory.

    Args:
        graph: changed in place.
        base: the node that made the memory.
        family: see `families`.
        gradients: whether written values have gradients, which a `detach` or a no_grad region would not pass on.

    Returns:
        The node with the memory's final value; None, with nothing changed, if some write has no functional form.
    """
    if not all(_is_possible(node, gradients) for node in family if node is not base):
        return None
    return _Rewriting(graph, base, family, gradients).run()


def _is_possible(node: Node, gradients: bool) -> bool:
    """True for a write with a functional form, or a view through which a part can be put back."""
    if gradients and any(mode == ("grad", False) for mode in node.meta.get("modes", ())):
        return False
    if isinstance(node.meta.get("val"), (list, tuple)) or node.target is getitem:
        return False  # autograd forbids writes to one view of several
    if written(node):
        return len(written(node)) == 1 and _functional(node) is not None
    return aliased(node) is None or _put_back(node, gradients) is not None


def _functional(write: Node) -> Callable[..., Any] | None:
    """Return the operator that computes the written value; `copy_`, `fill_` and `zero_` are special-cased."""
    packet, _, overload = str(write.target).removeprefix("aten.").partition(".")
    if packet in ("copy_", "fill_", "zero_"):
        return getattr(_aten, packet[:-1], None)
    if "out" in write.kwargs:
        function: Callable[..., Any] | None = without_out(write)
        return function
    return getattr(getattr(_aten, packet.removesuffix("_"), None), overload, None) if packet.endswith("_") else None


def _put_back(view: Node, gradients: bool) -> Callable[..., Any] | None:
    """Return a function from (whole, part) to the operator and arguments that rebuild the whole; None if there is none."""
    name = name_of(view)
    if view.target in _SAME:  # values written through it get no gradient
        return None if gradients else lambda whole, part: (_aten.alias.default, (part,))
    if name in _CONVERTED:  # to the dtype and device that it has: the tensor itself
        return lambda whole, part: (_aten.alias.default, (part,))
    if name == "select":
        return lambda whole, part: (_aten.select_scatter.default, (whole, part, *view.args[1:]))
    if name == "slice":
        return lambda whole, part: (_aten.slice_scatter.default, (whole, part, *view.args[1:]))
    if name == "diagonal":
        return lambda whole, part: (_aten.diagonal_scatter.default, (whole, part, *view.args[1:]))
    if name in _RESHAPED:
        return lambda whole, part: (_aten.reshape.default, (part, list(whole.meta["val"].shape)))
    if name in ("transpose", "t", "numpy_T", "mT", "swapaxes"):
        return lambda whole, part: (view.target, (part, *view.args[1:]))
    if name == "permute":
        dims: Any = view.args[1]
        back = [[dim % len(dims) for dim in dims].index(number) for number in range(len(dims))]
        return lambda whole, part: (_aten.permute.default, (part, back))
    return None


class _Rewriting:
    """The rewriting of one memory of a graph.

    Args:
        graph: changed in place.
        base: the node that made the memory.
        family: all nodes whose values lie in it.
        gradients: see `rewrite`.
    """

    def __init__(self, graph: fx.Graph, base: Node, family: set[Node], gradients: bool) -> None:
        self._graph, self._base, self._family, self._gradients = graph, base, family, gradients
        self._args = {node: node.args for node in family}
        self._lender = {node: _lender(node) for node in family if node is not base}
        self._writes = [node for node in graph.nodes if node in family and written(node)]
        self._version = 0
        self._values: dict[Node, tuple[int, Node]] = {base: (0, base)}  # member -> (version, the node with its value then)

    def run(self) -> Node:
        """Go through the graph in order; return the node with the base's final value."""
        begun = False
        for node in list(self._graph.nodes):
            if node is self._base:
                begun = True
                continue
            if not begun:
                continue
            if node in self._writes:
                self._write(node)
                continue
            self._read(node)
            if node in self._family:
                self._values[node] = (self._version, node)
        for node in reversed(self._writes):
            self._graph.erase_node(node)
        return self._values[self._base][1]

    def _read(self, node: Node) -> None:
        """Make a node read current values."""
        for read in node.all_input_nodes:
            if read in self._family:
                node.replace_input_with(read, self._value(read, node))

    def _value(self, member: Node, reader: Node) -> Node:
        """Return the node with a member's current value, made before the reader if need be."""
        version, held = self._values[member]
        if version == self._version:
            return held
        lender = self._lender[member]
        parent = self._value(lender, reader)
        if member in self._writes:  # a write returns the tensor it wrote to
            made = parent
        else:
            args = tuple(parent if argument is lender else argument for argument in self._args[member])
            made = self._call(member.target, args, dict(member.kwargs), reader)
        self._values[member] = (self._version, made)
        return made

    def _write(self, write: Node) -> None:
        member = self._lender[write]
        part = self._computed(write, self._value(member, write))
        while member is not self._base:
            lender = self._lender[member]
            if member not in self._writes:
                part = self._whole(member, lender, part, write)
            member = lender
        self._version += 1
        self._values[self._base] = (self._version, part)
        self._values[write] = (self._version - 1, part)  # outdated on purpose: looked up through its target

    def _computed(self, write: Node, old: Node) -> Node:
        """Return the value a write writes, with the shape and dtype of the old one."""

        def now(read: Node) -> Node:
            return self._value(read, write) if read in self._family else read

        given = fx.node.map_arg(arguments(write), now)
        value = old.meta["val"]
        packet = name_of(write)
        if packet == "zero_":
            return self._call(_aten.zeros_like.default, (old,), {}, write)
        if packet == "fill_":
            filled = given["value"]
            if not isinstance(filled, Node):
                return self._call(_aten.full_like.default, (old, filled), {}, write)
            part = filled
        elif packet == "copy_":
            part = given["src"]
        else:
            function = _functional(write)
            assert function is not None
            kwargs = {name: value for name, value in write.kwargs.items() if name != "out"}
            part = self._call(function, fx.node.map_arg(write.args, now), fx.node.map_arg(kwargs, now), write)
        if part.meta["val"].dtype != value.dtype:
            part = self._call(_aten.to.dtype, (part, value.dtype), {}, write)
        if part.meta["val"].shape != value.shape:
            part = self._call(_aten.expand.default, (part, list(value.shape)), {}, write)
        if packet in ("copy_", "fill_"):  # the value written has separate memory
            part = self._call(_aten.clone.default, (part,), {}, write)
        return part

    def _whole(self, view: Node, lender: Node, part: Node, write: Node) -> Node:
        """Return the tensor a view was taken of, with a new part in its place."""
        whole = self._value(lender, write)
        put_back = _put_back(view, self._gradients)
        assert put_back is not None
        target, args = put_back(whole, part)
        return self._call(target, args, {}, write)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], before: Node) -> Node:
        with self._graph.inserting_before(before):
            made = self._graph.call_function(target, args, kwargs)
        for key in ("modules", "modes", "stack_trace"):
            if key in before.meta:
                made.meta[key] = before.meta[key]
        values = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        made.meta["val"] = _on_fakes(target, *values)
        return made


def _lender(member: Node) -> Node:
    lender = written(member)[0] if written(member) else aliased(member)
    assert lender is not None, f"{member} shares no other node's memory"
    return lender


def _on_fakes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fakes = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    with getattr(fakes[0], "fake_mode"), torch.no_grad():  # noqa: B009  # a fake tensor's
        return target(*args, **kwargs)
