"""Products: cut along the output, or along the input, which leaves terms of a sum."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autofunc.experts import from_experts
from autofunc.spreading.layouts import FULL, TERMS, Cut, Layout
from autofunc.spreading.movements import on_first
from autofunc.spreading.operation import Node, Operation, Outcome, Want, shape_of
from autofunc.spreading.rules.table import NAMED, rule

_aten = torch.ops.aten


def linear_term(x: Tensor, weight: Tensor, bias: Tensor, axis: str) -> Tensor:
    """Return a term of a product with a bias; the first rank adds the bias."""
    return torch.add(_aten.linear.default(x, weight, None), on_first(bias, axis))


def addmm_term(bias: Tensor, x: Tensor, weight: Tensor, axis: str) -> Tensor:
    """Return a term of `addmm`; the first rank adds the bias."""
    return torch.add(torch.mm(x, weight), on_first(bias, axis))


@rule(_aten.linear)
def linear(op: Operation) -> Outcome | None:
    """`x @ weight.T + bias`."""
    x, weight, bias = op.given["input"], op.given["weight"], op.given["bias"]
    last, own, given = len(op.shape) - 1, op.cut(weight), op.cut(x)
    if len(shape_of(weight)) != 2:
        return None
    if own is not None and own.dim == 0:
        along = Want(bias, own) if bias is not None else None
        return op.becomes(own.at(last), input=Want(x, FULL), weight=Want(weight, own), **_given(bias=along))
    if own is not None:
        operands = Want(x, own.at(len(shape_of(x)) - 1)), Want(weight, own)
        if bias is None:
            return op.becomes(TERMS, input=operands[0], weight=operands[1])
        return Outcome(TERMS, linear_term, (*operands, Want(bias, FULL), op.axis))
    if given is not None and given.dim != len(shape_of(x)) - 1 and not _is_made_whole(op, x):
        return op.becomes(given, input=Want(x, given))
    return None


def _is_made_whole(op: Operation, x: Node) -> bool:
    """True if another product gathers the cut value anyway."""
    others = (user.args[1] for user in x.users if user.target is _aten.linear.default)
    return any((cut := op.cut(weight)) is not None and cut.dim == 0 for weight in others)


@rule(_aten.addmm)
def addmm(op: Operation) -> Outcome | None:
    """`bias + x @ weight`, as of GPT-2's `Conv1D`."""
    bias, x, weight = op.given["self"], op.given["mat1"], op.given["mat2"]
    if op.given["beta"] != 1 or op.given["alpha"] != 1 or len(shape_of(bias)) != 1:
        return None
    layout, wanted = _product(op, x, weight)
    if layout is None:
        return None
    if layout is TERMS:
        return Outcome(TERMS, addmm_term, (Want(bias, FULL), *wanted, op.axis))
    assert isinstance(layout, Cut)
    along = Want(bias, layout.at(0) if layout.dim == 1 and shape_of(bias)[0] != 1 else FULL)
    return op.becomes(layout, self=along, mat1=wanted[0], mat2=wanted[1])


@rule(_aten.mm)
def mm(op: Operation) -> Outcome | None:
    """`x @ y` of matrices."""
    layout, wanted = _product(op, op.given["self"], op.given["mat2"])
    return None if layout is None else op.becomes(layout, self=wanted[0], mat2=wanted[1])


@rule(_aten.bmm)
def bmm(op: Operation) -> Outcome | None:
    """`x @ y` of batches of matrices."""
    layout, wanted = _product(op, op.given["self"], op.given["mat2"])
    return None if layout is None else op.becomes(layout, self=wanted[0], mat2=wanted[1])


@rule(_aten.matmul)
def matmul(op: Operation) -> Outcome | None:
    """`x @ y` of any dims."""
    x, y = op.given["self"], op.given["other"]
    if len(shape_of(x)) < 2 or len(shape_of(y)) < 2:
        return None
    layout, wanted = _product(op, x, y)
    return None if layout is None else op.becomes(layout, self=wanted[0], other=wanted[1])


@rule(_aten.baddbmm)
def baddbmm(op: Operation) -> Outcome | None:
    """`beta * input + alpha * x @ y`, as in attention with a bias; cut along batches only."""
    layout, wanted = _product(op, op.given["batch1"], op.given["batch2"])
    if not isinstance(layout, Cut) or layout.dim != 0:
        return None
    bias = op.given["self"]
    own = shape_of(bias)
    along = Want(bias, layout if len(own) == 3 and own[0] == layout.whole else FULL)
    return op.becomes(layout, self=along, batch1=wanted[0], batch2=wanted[1])


def grouped(op: Operation, out: int = 2) -> Outcome | None:
    """Multiply rows of x, in groups, with one matrix per group: (rows, k), (groups, k, n), and where groups end.

    Args:
        op: the operator.
        out: the output dim of the matrices.
    """
    x, weight, ends = op.node.args[:3]
    own = op.cut(weight)
    if own is None or len(shape_of(weight)) != 3 or own.dim == 0:
        return None
    rest = op.node.args[3:]
    if own.dim == out:
        layout: Layout = own.at(1)
        wanted = (Want(x, FULL), Want(weight, own))  # type: ignore[arg-type]
    else:
        layout, wanted = TERMS, (Want(x, own.at(1)), Want(weight, own))  # type: ignore[arg-type]
    return Outcome(layout, op.node.target, (*wanted, ends, *rest), op.node.kwargs)  # type: ignore[arg-type]


NAMED["transformers.grouped_mm_fallback"] = NAMED["aten._grouped_mm"] = NAMED["autofunc.grouped_matmul"] = grouped
NAMED["autofunc.grouped_linear"] = partial(grouped, out=1)


@rule(from_experts, linear=True)
def brought_terms(op: Operation) -> Outcome | None:
    """Weighted sums of each token's rows: sums of terms are terms, with as many rows as there are tokens."""
    made, weights, *route = op.node.args
    if op.layout(made) is not TERMS or any(op.layout(each) is not FULL for each in (weights, *route)):
        return None
    return Outcome(TERMS, from_experts, (Want(made, TERMS), Want(weights, FULL), *route))  # type: ignore[arg-type]


def _product(op: Operation, x: Any, y: Any) -> tuple[Layout | None, tuple[Want, Want]]:
    """Return the layout of `x @ y`, and the wanted layouts of x (..., m, k) and y (..., k, n); either may be cut."""
    one, two, dims = op.cut(x), op.cut(y), len(op.shape)
    left, right = len(shape_of(x)), len(shape_of(y))
    full = (Want(x, FULL), Want(y, FULL))
    for cut, rank in ((one, left), (two, right)):
        if cut is not None and cut.dim < rank - 2:  # a batch of matrices
            dim = cut.dim - rank
            return cut.at(dims + dim), (_of_batch(x, left + dim, cut), _of_batch(y, right + dim, cut))
    if two is not None and two.dim == right - 1:
        return two.at(dims - 1), (full[0], Want(y, two))
    if one is not None and one.dim == left - 2:
        return one.at(dims - 2), (Want(x, one), full[1])
    inner = two or one
    if inner is None:
        return None, full
    return TERMS, (Want(x, inner.at(left - 1)), Want(y, inner.at(right - 2)))


def _of_batch(node: Any, dim: int, cut: Cut) -> Want:
    return Want(node, cut.at(dim) if dim >= 0 and shape_of(node)[dim] == cut.whole else FULL)


def _given(**named: Any) -> dict[str, Any]:
    return {name: value for name, value in named.items() if value is not None}
