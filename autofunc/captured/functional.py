"""Writes in place made functional: where weights are among what is written, every place between them can then be cut.

`x += block(x)` becomes `x1 = x + block(x)`, and what read `x` afterwards reads `x1`; a write to a part (`out[:, n] = x`)
becomes a new whole with that part. Views that were made before a write and are read after it are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.captured.flow import Flow
from autofunc.graph.memory import aliased, base_of, storages, written
from autofunc.graph.schema import arguments, without_out

Node = fx.Node

_aten = torch.ops.aten

_SAME = (_aten.detach.default, _aten.alias.default)
_RESHAPED = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "view_as")


def make_functional(flow: Flow) -> bool:
    """Rewrite what is written to values that need weights, in place; whether anything was."""
    changed = False
    bases = [base for base in flow.writes if base.op == "call_function" and base in flow.weighted]
    for base, family in families(flow.exported.graph, bases).items():
        changed |= rewrite(flow.exported.graph, base, family) is not None
    if changed:
        flow.exported.graph.lint()
    return changed


def families(graph: fx.Graph, bases: Iterable[Node]) -> dict[Node, set[Node]]:
    """By base: itself, and all that lies in its memory. Rewriting one leaves the others as they are."""
    found = {base: {base} for base in bases}
    for node in graph.nodes if found else ():
        base = base_of(node)
        # of what may share memory by its schema, that which really did
        if base in found and node.op == "call_function" and storages(node) & storages(base):
            found[base].add(node)
    return found


def rewrite(graph: fx.Graph, base: Node, family: set[Node], *, gradients: bool = True) -> Node | None:
    """Rewrite all that is written to one memory.

    Args:
        graph: changed in place.
        base: what the memory was made by.
        family: see `families`.
        gradients: whether what is written has any; they do not pass a `detach`, nor a region without them.

    Returns:
        What the memory holds in the end; None where something has no functional form, and nothing is changed.
    """
    if not all(_is_possible(node, gradients) for node in family if node is not base):
        return None
    return _Rewriting(graph, base, family, gradients).run()


def _is_possible(node: Node, gradients: bool) -> bool:
    """Whether a node of the memory is a write with a functional form, or a view that a part can be put back through."""
    if gradients and any(mode == ("grad", False) for mode in node.meta.get("modes", ())):
        return False
    if isinstance(node.meta.get("val"), (list, tuple)) or node.target is getitem:
        return False  # autograd does not let anything be written to one view of several
    if written(node):
        return len(written(node)) == 1 and _functional(node) is not None
    return aliased(node) is None or _put_back(node, gradients) is not None


def _functional(write: Node) -> Callable[..., Any] | None:
    """The operator that computes what a write writes; `copy_`, `fill_` and `zero_` have forms of their own."""
    packet, _, overload = str(write.target).removeprefix("aten.").partition(".")
    if packet in ("copy_", "fill_", "zero_"):
        return getattr(_aten, packet[:-1], None)
    if "out" in write.kwargs:
        function: Callable[..., Any] | None = without_out(write)
        return function
    return getattr(getattr(_aten, packet.removesuffix("_"), None), overload, None) if packet.endswith("_") else None


def _put_back(view: Node, gradients: bool) -> Callable[..., Any] | None:
    """From (whole, part) to the nodes' arguments of the operator that makes the whole anew; None where there is none."""
    name = str(view.target).removeprefix("aten.").partition(".")[0]
    if view.target in _SAME:  # what is written through it gets no gradient
        return None if gradients else lambda whole, part: (_aten.alias.default, (part,))
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
    """One memory of a graph.

    Args:
        graph: changed in place.
        base: what the memory was made by.
        family: all nodes whose values lie in it.
        gradients: see `rewrite`.
    """

    def __init__(self, graph: fx.Graph, base: Node, family: set[Node], gradients: bool) -> None:
        self._graph, self._base, self._family, self._gradients = graph, base, family, gradients
        self._args = {node: node.args for node in family}
        self._lender = {node: _lender(node) for node in family if node is not base}
        self._writes = [node for node in graph.nodes if node in family and written(node)]
        self._version = 0
        self._values: dict[Node, tuple[int, Node]] = {base: (0, base)}  # member -> (version, what holds it then)

    def run(self) -> Node:
        """Go through the graph in order; returns what holds the base's value in the end."""
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
        """Let a node read the values of now."""
        for read in node.all_input_nodes:
            if read in self._family:
                node.replace_input_with(read, self._value(read, node))

    def _value(self, member: Node, reader: Node) -> Node:
        """What holds a member's value now; made before the reader, if need be."""
        version, held = self._values[member]
        if version == self._version:
            return held
        lender = self._lender[member]
        parent = self._value(lender, reader)
        if member in self._writes:  # what it returns is what it wrote to
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
        self._values[write] = (self._version - 1, part)  # of before: it is looked up through what it wrote to

    def _computed(self, write: Node, old: Node) -> Node:
        """What a write writes, with the shape and dtype of what was there."""

        def now(read: Node) -> Node:
            return self._value(read, write) if read in self._family else read

        given = fx.node.map_arg(arguments(write), now)
        value = old.meta["val"]
        packet = str(write.target).removeprefix("aten.").partition(".")[0]
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
        if packet in ("copy_", "fill_"):  # what was written lies in memory of its own
            part = self._call(_aten.clone.default, (part,), {}, write)
        return part

    def _whole(self, view: Node, lender: Node, part: Node, write: Node) -> Node:
        """What a view was taken of, with a new part in its place."""
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
    assert lender is not None, f"{member} lies in no other's memory"
    return lender


def _on_fakes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fakes = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    with getattr(fakes[0], "fake_mode"), torch.no_grad():  # noqa: B009  # a fake tensor's
        return target(*args, **kwargs)
