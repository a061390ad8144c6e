"""The dims of a value along which the rows of masks lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from autofunc.graph.memory import base_of, written
from autofunc.graph.schema import arguments, is_mutable, is_random

Node = fx.Node

Rows = Mapping[int, Node]
"""For a value: dim -> the node of the mask whose places index that dim."""


class MixesRows(Exception):
    """An operator mixes rows, or is not known not to."""


def aligned(node: Node, known: Mapping[Node, Rows]) -> Rows:
    """Return the rows of a pointwise operator's result: dims are matched from the last."""
    sizes = shape_of(node)
    found: dict[int, Node] = {}
    tensors = [(read, len(sizes) - read.meta["val"].dim()) for read in tensors_of(node)]
    for read, shift in tensors:
        for dim, mask in known.get(read, {}).items():
            if sizes[dim + shift] != shape_of(read)[dim] or not same_mask(found.setdefault(dim + shift, mask), mask):
                raise MixesRows
    for read, shift in tensors:
        own = {dim + shift for dim in known.get(read, {})}
        if any(dim >= shift and shape_of(read)[dim - shift] != 1 for dim in found.keys() - own):
            raise MixesRows
    return found


def same_mask(one: Node, other: Node) -> bool:
    """True if two masks, given by their nodes, have the same values: made in the same way from the same values."""
    return one is other or _same(one.args[0], other.args[0])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Node) and isinstance(other, Node):
        if one is other:
            return not _is_written(one)
        if one.op != "call_function" or one.target is not other.target or is_mutable(one) or is_random(one):
            return False
        if _is_written(one) or _is_written(other):
            return False
        return _same(one.args, other.args) and _same(dict(one.kwargs), dict(other.kwargs))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


def _is_written(node: Node) -> bool:
    base = base_of(node)
    return any(base_of(target) is base for each in node.graph.nodes for target in written(each))


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape of a value, or of the first of several."""
    value = node.meta["val"]
    return tuple((value if isinstance(value, Tensor) else value[0]).shape)


def tensors_of(node: Node) -> list[Node]:
    """Return the tensors that a node reads."""
    return [read for read in node.all_input_nodes if isinstance(read.meta.get("val"), Tensor)]


def rows_of_one(node: Node, known: Mapping[Node, Rows], name: str) -> Rows:
    """Return the rows of an argument; no other argument may have any."""
    read = arguments(node)[name]
    if any(known.get(other) for other in node.all_input_nodes if other is not read):
        raise MixesRows
    return known.get(read, {})


def first_of(node: Node) -> tuple[Node, int]:
    """Return the first argument and its number of dims."""
    read: Any = node.args[0]
    return read, read.meta["val"].dim()


def kept(node: Node, known: Mapping[Node, Rows]) -> Rows:
    """Return the rows of the first argument; no other argument may have any."""
    return rows_of_one(node, known, next(iter(arguments(node))))


def dims_of(node: Node, count: int) -> list[int]:
    """Return the dims that an operator is given; all of them if it is given none."""
    given = arguments(node)
    value = given["dims"] if "dims" in given else given.get("dim")
    if value is None or value == []:
        return list(range(count))
    return [dim % max(count, 1) for dim in (value if isinstance(value, (list, tuple)) else [value])]
