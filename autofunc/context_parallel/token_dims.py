"""The dim along which tokens lie in values that depend on the batch alone, which every rank has whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.rules import by_rule
from autofunc.context_parallel.traced import Traced
from autofunc.graph.memory import base_of, written
from autofunc.graph.schema import is_mutable, name_of
from autofunc.spreading import FULL, Cut
from autofunc.spreading.layouts import Layout
from autofunc.spreading.operation import shape_of

Node = fx.Node

_TOKENS_DIM = 1


def of_entries(tensors: Mapping[str, Tensor]) -> dict[str, Cut]:
    """Return how entries of a batch of rows would be cut: along dim 1, for those that have it."""
    return {
        name: Cut(_TOKENS_DIM, (leaf.shape[_TOKENS_DIM],))
        for name, leaf in tensors.items()
        if leaf.dim() > _TOKENS_DIM and leaf.shape[_TOKENS_DIM] > 1
    }


def of_operator(node: Node, known: Mapping[Node, Layout], axis: ContextAxis) -> Layout:
    """Return how an operator's result would be cut, given how its operands would be."""
    seen: dict[Node, Any] = {each: known.get(each, FULL) for each in node.all_input_nodes}
    if is_mutable(node) or all(layout is FULL for layout in seen.values()):
        return FULL
    found = by_rule(node, seen, axis)
    layout = found.layout if found is not None else FULL
    return layout if isinstance(layout, Cut) else FULL


def of_shared(whole: Traced, axis: ContextAxis) -> list[Layout]:
    """Return how the values that layers share would be cut, followed from entries of the batch, in the order returned.

    A value made from entries in a way that no rule follows, such as labels written into another tensor one place further,
    is cut like an entry of the same shape.
    """
    known: dict[Node, Layout] = dict(of_nodes(whole.entries))
    shapes = {shape_of(node): layout for node, layout in known.items() if len(shape_of(node)) == _TOKENS_DIM + 1}
    for node in whole.module.graph.nodes:
        if node.op == "call_function":
            known[node] = of_operator(node, known, axis)
    layouts, depending = list[Layout](), _depending(whole)
    for node in whole.returned:
        layout = known.get(node, FULL) if isinstance(node, Node) else FULL
        if layout is FULL and isinstance(node, Node) and shape_of(node) in shapes and node in depending:
            layout = shapes[shape_of(node)]
        layouts.append(layout)
    return layouts


def of_nodes(entries: Mapping[str, Node]) -> dict[Node, Cut]:
    """Return `of_entries`, by node."""
    found = of_entries({name: node.meta["val"] for name, node in entries.items()})
    return {entries[name]: cut for name, cut in found.items()}


def _depending(whole: Traced) -> set[Node]:
    """Return the nodes that depend on an entry's contents, not on its shape alone."""
    found = set(whole.entries.values())
    for node in whole.module.graph.nodes:
        if node.op != "call_function" or is_made_by_shape(node) or not found.intersection(node.all_input_nodes):
            continue
        found.add(node)
        found.update(map(base_of, written(node)))
    return found


def is_made_by_shape(node: Node) -> bool:
    """True if an operator uses no more than its operand's shape: `new_zeros`, `zeros_like` and so on."""
    name = name_of(node)
    return name.startswith("new_") or name.endswith("_like")
