"""Views: the same elements in another order or shape; sizes become those of what each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

import torch

from autofunc.spreading.layouts import FULL, TERMS, Cut, local_shape
from autofunc.spreading.operation import Borders, Node, Operation, Outcome, Undivided, Want, shape_of
from autofunc.spreading.rules.table import rule

_aten = torch.ops.aten


@rule(_aten.view, _aten.reshape, _aten._unsafe_view, _aten.flatten, _aten.unflatten)
def view(op: Operation) -> Outcome | None:
    """The same elements, in order, in another shape.

    Raises:
        Undivided: if the cut dim is split, and ranks cannot share its outermost dim equally.
        Borders: if they could share parts of it.
    """
    x = op.given["self"]
    cut = op.cut(x)
    if cut is None or 0 in op.shape:
        return None
    found = viewed(shape_of(x), op.shape, cut, op.size, x)
    sizes = list(local_shape(op.shape, found, op.size)) if found is not None else []
    return None if found is None else Outcome(found, _aten.reshape.default, (Want(x, cut), sizes))


def viewed(before: Sequence[int], after: Sequence[int], cut: Cut, size: int, node: Node) -> Cut | None:
    """Return the layout of a view of a cut value; None if no dim has a rank's elements as its part."""
    start, end, first, last = _group(before, after, cut.dim)
    inner = prod(before[cut.dim + 1 : end])
    parts = [part * inner for part in cut.parts] * prod(before[start : cut.dim])
    blocked = 0  # number of places that each part is split into, and ranks cannot share equally
    for dim in range(first, last):
        if after[dim] == 1:
            continue
        outer, rest = prod(after[first:dim]), prod(after[dim + 1 : last])
        found = _repeated(parts, outer)
        if found is not None and sum(found) == after[dim] * rest:
            if not any(part % (rest * size) for part in found):
                return Cut(dim, tuple(part // rest for part in found))
            if not blocked and len({*found}) == 1 and found[0] % rest == 0 and found[0] > rest:
                blocked = found[0] // rest
        elif blocked and outer == blocked and len(parts) == 1 and dim < last - 1 and after[dim] % size == 0:
            raise Borders(node, [cut.whole * number // outer for number in range(1, outer)])
    if blocked:
        raise Undivided(node, blocked)
    return None


def _repeated(parts: list[int], times: int) -> list[int] | None:
    """Return the parts that are repeated this many times; None if they are not."""
    once = parts[: len(parts) // times]
    return once if once * times == parts else None


def _group(before: Sequence[int], after: Sequence[int], dim: int) -> tuple[int, int, int, int]:
    """Return the dims around one, and the view's dims with the same elements: [start, end) and [first, last)."""
    i = j = 0
    while True:
        start, first = i, j
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        if dim < i:
            return start, i, first, j


@rule(_aten.expand)
def expand(op: Operation) -> Outcome | None:
    """Repeat along dims of size one."""
    x = op.given["self"]
    cut = op.cut(x)
    if cut is None:
        return None
    moved = cut.at(cut.dim + len(op.shape) - len(shape_of(x)))
    return op.becomes(moved, self=Want(x, cut), size=list(local_shape(op.shape, moved, op.size)))


@rule(_aten.transpose, _aten.swapaxes)
def transpose(op: Operation) -> Outcome | None:
    """Swap two dims."""
    x, names = op.given["self"], list(op.given)[1:3]
    one, two = (op.given[name] % len(op.shape) for name in names)
    return _moved(op, x, {one: two, two: one})


@rule(_aten.t, _aten.numpy_T, _aten.mT)
def t(op: Operation) -> Outcome | None:
    """Swap the last two dims."""
    dims = len(op.shape)
    return _moved(op, op.given["self"], {dims - 2: dims - 1, dims - 1: dims - 2}) if dims > 1 else None


@rule(_aten.permute)
def permute(op: Operation) -> Outcome | None:
    """Reorder dims."""
    dims = len(op.shape)
    return _moved(op, op.given["self"], {old % dims: new for new, old in enumerate(op.given["dims"])})


@rule(_aten.movedim)
def movedim(op: Operation) -> Outcome | None:
    """Move one dim."""
    if op.node.target is not _aten.movedim.int:
        return None
    dims, source, target = len(op.shape), op.given["source"], op.given["destination"]
    order = [dim for dim in range(dims) if dim != source % dims]
    order.insert(target % dims, source % dims)
    return _moved(op, op.given["self"], {old: new for new, old in enumerate(order)})


@rule(_aten.unsqueeze)
def unsqueeze(op: Operation) -> Outcome | None:
    """Insert a dim of size one."""
    at, dims = op.given["dim"] % len(op.shape), len(op.shape) - 1
    return _moved(op, op.given["self"], {dim: dim + (dim >= at) for dim in range(dims)})


@rule(_aten.squeeze)
def squeeze(op: Operation) -> Outcome | None:
    """Drop dims of size one."""
    x = op.given["self"]
    shape, given = shape_of(x), op.given.get("dim")
    chosen = range(len(shape)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    gone = {dim % len(shape) for dim in chosen if shape[dim] == 1}
    left = [dim for dim in range(len(shape)) if dim not in gone]
    return _moved(op, x, {old: new for new, old in enumerate(left)})


def _moved(op: Operation, x: Node, places: dict[int, int]) -> Outcome | None:
    cut = op.cut(x)
    return None if cut is None else op.becomes(cut.at(places.get(cut.dim, cut.dim)), self=Want(x, cut))


@rule(
    _aten.view, _aten.reshape, _aten._unsafe_view, _aten.flatten, _aten.unflatten, _aten.expand, _aten.transpose, _aten.t,
    _aten.permute, _aten.unsqueeze, _aten.squeeze, _aten.slice, _aten.select, _aten.index, _aten.swapaxes, _aten.movedim,
    linear=True,
)  # fmt: skip
def terms_seen(op: Operation) -> Outcome | None:
    """A term in another shape, or a part of it."""
    return op.becomes(TERMS, self=Want(op.given["self"], TERMS))


# --- parts of a value, and concatenation


@rule(_aten.slice)
def slice_(op: Operation) -> Outcome | None:
    """Take a range along a dim.

    Raises:
        Borders: if it does not begin and end where parts of the cut dim do.
    """
    x, shape = op.given["self"], shape_of(op.given["self"])
    cut, dim, step = op.cut(x), op.given["dim"] % len(shape), op.given["step"]
    if cut is None or (dim == cut.dim and step != 1):
        return None
    if dim != cut.dim:
        return op.becomes(cut, self=Want(x, cut))
    start, end, _ = slice(op.given["start"], op.given["end"]).indices(shape[dim])
    kept = parts_between(cut, start, end, x)
    made = op.becomes(Cut(dim, kept), self=Want(x, cut), start=start // op.size, end=end // op.size)
    return replace(made, ranges=((start, end),))


def parts_between(cut: Cut, start: int, end: int, node: Node) -> tuple[int, ...]:
    """Return the parts of a cut within a range.

    Raises:
        Borders: if the range does not begin and end where parts do.
    """
    borders = cut.borders
    if start not in borders or end not in borders:
        raise Borders(node, [start, end])
    return cut.parts[borders.index(start) : borders.index(end)]


@rule(_aten.narrow)
def narrow(op: Operation) -> Outcome | None:
    """Like `slice_`."""
    x, dim = op.given["self"], op.given["dim"] % len(op.shape)
    cut, start, length = op.cut(x), op.given["start"], op.given["length"]
    if cut is None or isinstance(start, Node):
        return None
    if dim != cut.dim:
        return op.becomes(cut, self=Want(x, cut))
    kept = parts_between(cut, start, start + length, x)
    made = op.becomes(Cut(dim, kept), self=Want(x, cut), start=start // op.size, length=length // op.size)
    return replace(made, ranges=((start, start + length),))


@rule(_aten.select, _aten.unbind)
def places(op: Operation) -> Outcome | None:
    """Take one place along a dim, or all of them one by one."""
    x, shape = op.given["self"], shape_of(op.given["self"])
    cut, dim = op.cut(x), op.given["dim"] % len(shape)
    if cut is None:
        return None
    if dim == cut.dim:
        raise Borders(x, range(1, shape[dim]))
    place = cut.at(cut.dim - (dim < cut.dim))
    return op.becomes(place if "index" in op.given else (place,) * shape[dim], self=Want(x, cut))


@rule(_aten.split, _aten.split_with_sizes, _aten.chunk, _aten.unsafe_chunk, _aten.unsafe_split)
def split(op: Operation) -> Outcome | None:
    """Split into ranges along a dim."""
    x = op.given["self"]
    cut = op.cut(x)
    dim = op.given["dim"] % len(shape_of(x))
    widths = [each.shape[dim] for each in op.node.meta["val"]]
    if cut is None:
        return None
    if dim != cut.dim:
        return op.becomes((cut,) * len(widths), self=Want(x, cut))
    ranges = tuple((end - width, end) for end, width in zip(accumulate(widths), widths, strict=True))
    layouts = tuple(Cut(dim, parts_between(cut, start, end, x)) for start, end in ranges)
    sizes = [width // op.size for width in widths]
    return Outcome(layouts, _aten.split_with_sizes.default, (Want(x, cut), sizes, dim), ranges=ranges)


@rule(_aten.cat, _aten.concat)
def cat(op: Operation) -> Outcome | None:
    """Concatenate values: along another dim than the cut one, or each value's parts."""
    values, dim = op.given["tensors"], op.given["dim"] % len(op.shape)
    cut = next((cut for each in values if (cut := op.cut(each)) is not None), None)
    if cut is None or any(len(shape_of(each)) != len(op.shape) for each in values):
        return None
    if dim != cut.dim:
        return op.becomes(cut, tensors=[Want(each, cut) for each in values])
    cuts = [op.cut(each) or Cut(dim, (shape_of(each)[dim],)) for each in values]
    if any(each.dim != dim or not each.fits(op.size) for each in cuts):
        return None
    parts = tuple(part for each in cuts for part in each.parts)
    return op.becomes(Cut(dim, parts), tensors=[Want(each, one) for each, one in zip(values, cuts, strict=True)])


@rule(_aten.stack)
def stack(op: Operation) -> Outcome | None:
    """Stack values along a new dim."""
    values, dim = op.given["tensors"], op.given["dim"] % len(op.shape)
    cut = next((cut for each in values if (cut := op.cut(each)) is not None), None)
    if cut is None:
        return None
    return op.becomes(cut.at(cut.dim + (dim <= cut.dim)), tensors=[Want(each, cut) for each in values])


@rule(_aten.repeat_interleave)
def repeat_interleave(op: Operation) -> Outcome | None:
    """Repeat each place of a dim."""
    if op.node.target is not _aten.repeat_interleave.self_int or op.given["dim"] is None:
        return None
    x, times = op.given["self"], op.given["repeats"]
    cut, dim = op.cut(x), op.given["dim"] % len(op.shape)
    if cut is None:
        return None
    parts = tuple(part * times for part in cut.parts) if dim == cut.dim else cut.parts
    return op.becomes(Cut(cut.dim, parts), self=Want(x, cut), **({"output_size": None} if dim == cut.dim else {}))


@rule(_aten.repeat)
def repeat(op: Operation) -> Outcome | None:
    """Repeat a whole value, but not along the cut dim."""
    x, times = op.given["self"], op.given["repeats"]
    cut = op.cut(x)
    if cut is None:
        return None
    moved = cut.at(cut.dim + len(op.shape) - len(shape_of(x)))
    return op.becomes(moved, self=Want(x, cut)) if times[moved.dim] == 1 else None


@rule(_aten.index)
def index(op: Operation) -> Outcome | None:
    """Index along dims other than the cut one."""
    x, indices = op.given["self"], op.given["indices"]
    cut, used = op.cut(x), [dim for dim, each in enumerate(op.given["indices"]) if each is not None]
    if cut is None or cut.dim in used or any(op.layout(each) is not FULL for each in indices if each is not None):
        return None
    if used != list(range(used[0], used[-1] + 1)) or any(each.meta["val"].dtype is torch.bool for each in indices if each):
        return None
    grown = len(op.shape) - (len(shape_of(x)) - len(used))
    return op.becomes(cut.at(cut.dim if cut.dim < used[0] else cut.dim - len(used) + grown), self=Want(x, cut))


@rule(_aten.index_select, _aten.flip, _aten.roll, _aten.tril, _aten.triu, _aten.pad, _aten.constant_pad_nd)
def beside(op: Operation) -> Outcome | None:
    """Operators along other dims than the cut one."""
    x = op.given["self"]
    cut, name = op.cut(x), str(op.node.target).split(".")[1]
    if cut is None:
        return None
    dims = len(op.shape)
    if name in ("tril", "triu"):
        touched = {dims - 2, dims - 1}
    elif "pad" in name:
        if op.given.get("mode", "constant") != "constant":
            return None
        touched = {dims - 1 - number // 2 for number, each in enumerate(op.given["pad"]) if each}
    else:
        given: Any = op.given.get("dim", op.given.get("dims"))
        touched = {dim % dims for dim in (given if isinstance(given, (list, tuple)) else [given])}
        if name == "roll" and not given:
            return None
    return None if cut.dim in touched else op.becomes(cut, self=Want(x, cut))
