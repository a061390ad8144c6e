"""Operators that treat rows separately: where a mask's rows lie in their results, given where they lie in the arguments.

Only operators known to do so are let through. A row that does not count then affects no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from autofunc.captured.row_dims import (
    MixesRows,
    Rows,
    aligned,
    dims_of,
    first_of,
    kept,
    rows_of_one,
    same_mask,
    shape_of,
)  # fmt: skip
from autofunc.graph.schema import arguments, is_operator, is_pointwise, name_of

Node = fx.Node


def rows_of_result(node: Node, known: Mapping[Node, Rows]) -> Rows:
    """Return the rows in an operator's result; if it has several results, the rows in each.

    Args:
        node: an operator with rows among its arguments.
        known: the rows of every node that has any.

    Raises:
        MixesRows: if it does not treat rows separately.
    """
    if node.target is getitem:
        return known[node.args[0]]  # type: ignore[index]
    if not is_operator(node):
        raise MixesRows
    if is_pointwise(node):
        return aligned(node, known)
    rule = _RULES.get(name_of(node))
    if rule is None:
        raise MixesRows
    return rule(node, known)


def indexed(node: Node, known: Mapping[Node, Rows]) -> tuple[Rows, int | None]:
    """Return the rows of `x[indices]`, and the dim in which its indices' rows lie; None if the indices have none.

    Args:
        node: `index` or `index_put`.
        known: see `rows_of_result`.
    """
    given = arguments(node)
    whole, indices = given["self"], list(given["indices"])
    used = [place for place, index in enumerate(indices) if index is not None]
    tensors = [indices[place] for place in used]
    if any(index.meta["val"].dtype == torch.bool for index in tensors):
        raise MixesRows
    depth = max(index.meta["val"].dim() for index in tensors)
    shape = torch.broadcast_shapes(*map(shape_of, tensors))  # type: ignore[no-untyped-call]
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    found: dict[int, Node] = {}
    for index in tensors:
        shift = depth - index.meta["val"].dim()
        for dim, mask in known.get(index, {}).items():
            if shape[dim + shift] != shape_of(index)[dim] or not same_mask(
                found.setdefault(first + dim + shift, mask), mask
            ):
                raise MixesRows
    if len(found) > 1:
        raise MixesRows
    for index in tensors:
        shift = depth - index.meta["val"].dim()
        own = {first + dim + shift for dim in known.get(index, {})}
        if any(dim - first >= shift and shape_of(index)[dim - first - shift] != 1 for dim in found.keys() - own):
            raise MixesRows
    chosen = next(iter(found), None)
    for dim, mask in known.get(whole, {}).items():
        if dim in used:
            raise MixesRows
        before = sum(place < dim for place in used)
        found[dim - before + (depth if first == 0 or dim > first else 0)] = mask
    return found, chosen


def _recast(node: Node, known: Mapping[Node, Rows]) -> Rows:
    return known.get(first_of(node)[0], {})


def _along(node: Node, known: Mapping[Node, Rows]) -> Rows:
    """For an operator along other dims, which keeps all dims."""
    rows, (_, count) = kept(node, known), first_of(node)
    if set(dims_of(node, count)) & rows.keys():
        raise MixesRows
    return rows


def _reduced(node: Node, known: Mapping[Node, Rows]) -> Rows:
    rows, (_, count) = _along(node, known), first_of(node)
    return rows if arguments(node).get("keepdim") else _without(rows, dims_of(node, count))


def _without(rows: Rows, dims: Sequence[int]) -> Rows:
    return {dim - sum(gone < dim for gone in dims): mask for dim, mask in rows.items()}


def _viewed(node: Node, known: Mapping[Node, Rows]) -> Rows:
    """For a reshape: a dim of rows is found again by its size and the sizes before it."""
    rows, before, after = kept(node, known), shape_of(first_of(node)[0]), shape_of(node)
    found: dict[int, Node] = {}
    for dim, mask in rows.items():
        leading = math.prod(before[:dim])
        fitting = [place for place, size in enumerate(after) if size == before[dim] and math.prod(after[:place]) == leading]
        if len(fitting) > 1 and len(before) == len(after):
            fitting = [dim] if dim in fitting else []
        if len(fitting) != 1:
            raise MixesRows
        found[fitting[0]] = mask
    return found


def _permuted(node: Node, known: Mapping[Node, Rows]) -> Rows:
    rows, (_, count) = kept(node, known), first_of(node)
    order = list(range(count))
    match name_of(node):
        case "permute":
            order = dims_of(node, count)
        case "transpose":
            pair: Any = node.args[1:3]
            one, other = (dim % count for dim in pair)
            order[one], order[other] = other, one
        case _:
            order.reverse()
    return {order.index(dim): mask for dim, mask in rows.items()}


def _unsqueezed(node: Node, known: Mapping[Node, Rows]) -> Rows:
    rows, (_, count) = kept(node, known), first_of(node)
    (new,) = dims_of(node, count + 1)
    return {dim + (dim >= new): mask for dim, mask in rows.items()}


def _squeezed(node: Node, known: Mapping[Node, Rows]) -> Rows:
    rows, (read, count) = kept(node, known), first_of(node)
    gone = [dim for dim in dims_of(node, count) if shape_of(read)[dim] == 1]
    if set(gone) & rows.keys():
        raise MixesRows
    return _without(rows, gone)


def _selected(node: Node, known: Mapping[Node, Rows]) -> Rows:
    return _without(_along(node, known), dims_of(node, first_of(node)[1]))


def _sliced(node: Node, known: Mapping[Node, Rows]) -> Rows:
    rows, (read, count) = kept(node, known), first_of(node)
    is_all = shape_of(read) == shape_of(node) and arguments(node)["step"] == 1
    if not is_all and set(dims_of(node, count)) & rows.keys():
        raise MixesRows
    return rows


def _normalised(node: Node, known: Mapping[Node, Rows]) -> Rows:
    rows, (_, count) = kept(node, known), first_of(node)
    if any(dim >= count - len(arguments(node)["normalized_shape"]) for dim in rows):
        raise MixesRows
    return rows


def _joined(node: Node, known: Mapping[Node, Rows]) -> Rows:
    """For a join along another dim; `stack` makes that dim."""
    given = arguments(node)
    parts, is_new = list(given["tensors"]), name_of(node) == "stack"
    count = parts[0].meta["val"].dim() + is_new
    dim = given["dim"] % count
    rows: Rows = known.get(parts[0], {})
    for part in parts[1:]:
        own = known.get(part, {})
        if own.keys() != rows.keys() or not all(same_mask(own[each], rows[each]) for each in rows):
            raise MixesRows
    if is_new:
        return {each + (each >= dim): mask for each, mask in rows.items()}
    if dim in rows:
        raise MixesRows
    return rows


def _product(node: Node, known: Mapping[Node, Rows]) -> Rows:
    """For a product of matrices, or batches of them: the summed dims have no rows."""
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "matmul": ("self", "other")}
    given = arguments(node)
    one, other = (given[name] for name in names.get(name_of(node), ("self", "mat2")))
    sides = [(one, known.get(one, {})), (other, known.get(other, {}))]
    count = len(shape_of(node))
    for added in node.all_input_nodes:
        if added not in (one, other) and (known.get(added) or math.prod(shape_of(added)[:-1]) != 1):
            raise MixesRows
    found: dict[int, Node] = {}
    if min(len(shape_of(one)), len(shape_of(other))) < 2:
        raise MixesRows
    for number, (side, rows) in enumerate(sides):
        for dim, mask in rows.items():
            summed = len(shape_of(side)) - (1 if number == 0 else 2)
            place = dim + count - len(shape_of(side))
            if dim == summed or shape_of(node)[place] != shape_of(side)[dim] or not same_mask(
                found.setdefault(place, mask), mask
            ):  # fmt: skip
                raise MixesRows
    for place in found:
        for side, rows in sides:
            dim = place - count + len(shape_of(side))
            is_batch = place < count - 2
            if is_batch and dim >= 0 and dim not in rows and shape_of(side)[dim] != 1:
                raise MixesRows
    return found


def _linear(node: Node, known: Mapping[Node, Rows]) -> Rows:
    rows, (_, count) = rows_of_one(node, known, "input"), first_of(node)
    if count - 1 in rows:
        raise MixesRows
    return rows


def _einsum(node: Node, known: Mapping[Node, Rows]) -> Rows:
    given = arguments(node)
    read, arrow, made = str(given["equation"]).replace(" ", "").partition("->")
    operands = read.split(",")
    if not arrow or "." in read:
        raise MixesRows
    masks: dict[str, Node] = {}
    for letters, operand in zip(operands, given["tensors"], strict=True):
        for dim, mask in known.get(operand, {}).items():
            if not same_mask(masks.setdefault(letters[dim], mask), mask):
                raise MixesRows
    for letters, operand in zip(operands, given["tensors"], strict=True):
        own = known.get(operand, {})
        if any(letter in masks and place not in own for place, letter in enumerate(letters)):
            raise MixesRows
    if any(letter not in made for letter in masks):
        raise MixesRows
    return {made.index(letter): mask for letter, mask in masks.items()}


def _looked_up(node: Node, known: Mapping[Node, Rows]) -> Rows:
    return rows_of_one(node, known, "indices")


def _index_selected(node: Node, known: Mapping[Node, Rows]) -> Rows:
    given = arguments(node)
    (dim,) = dims_of(node, first_of(node)[1])
    found = dict(known.get(given["self"], {}))
    if dim in found:
        raise MixesRows
    chosen = known.get(given["index"], {})
    return found | dict(zip([dim], chosen.values(), strict=False))


def _gathered(node: Node, known: Mapping[Node, Rows]) -> Rows:
    given = arguments(node)
    (dim,) = dims_of(node, first_of(node)[1])
    whole, index = known.get(given["self"], {}), known.get(given["index"], {})
    beside = {each: mask for each, mask in index.items() if each != dim}
    if dim in whole or whole.keys() != beside.keys() or not all(same_mask(whole[each], beside[each]) for each in whole):
        raise MixesRows
    return index


Rule = Callable[[Node, Mapping[Node, Rows]], Rows]

_BY_RULE: Mapping[Rule, str] = {
    _recast: "to type_as",
    kept: "_to_copy clone contiguous detach alias lift_fresh_copy dropout zeros_like ones_like full_like one_hot",
    _along: "softmax _softmax log_softmax _log_softmax cumsum cumprod sort argsort topk flip glu "
    "split split_with_sizes chunk",
    _reduced: "sum mean amax amin max min prod argmax argmin logsumexp norm linalg_vector_norm var std any all",
    _viewed: "view reshape _unsafe_view flatten unflatten view_as",
    _permuted: "permute transpose t numpy_T",
    _unsqueezed: "unsqueeze",
    _squeezed: "squeeze",
    _selected: "select unbind",
    _sliced: "slice",
    _normalised: "layer_norm rms_norm",
    _joined: "cat stack concat",
    _product: "matmul mm bmm addmm baddbmm",
    _linear: "linear",
    _einsum: "einsum",
    _looked_up: "embedding",
    _index_selected: "index_select",
    _gathered: "gather",
    aligned: "expand expand_as copy_ fill_ zero_ where __and__ __or__ __xor__",
    lambda node, known: indexed(node, known)[0]: "index",
}
_RULES = {name: rule for rule, names in _BY_RULE.items() for name in names.split()}
