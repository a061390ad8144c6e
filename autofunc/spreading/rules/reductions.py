"""Sums, norms, softmax and the like: unchanged along other dims; sums along the cut dim leave terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autofunc.spreading.layouts import TERMS, Cut
from autofunc.spreading.movements import add_up, share
from autofunc.spreading.operation import Operation, Outcome, Want, shape_of
from autofunc.spreading.rules.table import rule
from autofunc.spreading.rules.views import parts_between

_aten = torch.ops.aten


@rule(_aten.sum, _aten.mean)
def added(op: Operation) -> Outcome | None:
    """Sums and means."""
    x = op.given["self"]
    cut = op.cut(x)
    if cut is None:
        return None
    dims = _dims(op, x)
    left = _left(op, cut, dims)
    if left is not None:
        return op.becomes(left, self=Want(x, cut))
    if str(op.node.target).startswith("aten.sum"):
        return op.becomes(TERMS, self=Want(x, cut))
    return Outcome(
        TERMS, mean_term, (Want(x, cut), sorted(dims), bool(op.given.get("keepdim")), op.given.get("dtype"), op.size)
    )


def mean_term(x: Tensor, dims: list[int], keepdim: bool, dtype: torch.dtype | None, size: int) -> Tensor:
    """Return a term of a mean, of which each of `size` ranks has equally many elements."""
    return x.mean(dims, keepdim, dtype=dtype) / size


@rule(_aten.sum, _aten.mean, linear=True)
def added_terms(op: Operation) -> Outcome | None:
    """Sums of terms."""
    return op.becomes(TERMS, self=Want(op.given["self"], TERMS))


@rule(
    _aten.amax, _aten.amin, _aten.prod, _aten.any, _aten.all, _aten.var, _aten.std, _aten.logsumexp, _aten.argmax,
    _aten.norm,
)  # fmt: skip
def reduced(op: Operation) -> Outcome | None:
    """Other reductions, over dims other than the cut one."""
    x = op.given["self"]
    cut = op.cut(x)
    left = _left(op, cut, _dims(op, x)) if cut is not None else None
    return None if left is None else op.becomes(left, self=Want(x, cut))  # type: ignore[arg-type]


def _dims(op: Operation, x: Any) -> set[int]:
    shape, given = shape_of(x), op.given.get("dim")
    chosen: Any = given if isinstance(given, (list, tuple)) else [given]
    return set(range(len(shape))) if given is None or given == [] else {dim % len(shape) for dim in chosen}


def _left(op: Operation, cut: Cut, dims: set[int]) -> Cut | None:
    """Return the layout of a reduction over some dims; None if the cut dim is among them."""
    if cut.dim in dims:
        return None
    return cut if op.given.get("keepdim") else cut.at(cut.dim - sum(dim < cut.dim for dim in dims))


@rule(
    _aten.softmax, _aten.log_softmax, _aten._softmax, _aten._log_softmax, _aten.cumsum, _aten.cumprod, _aten.sort,
    _aten.topk, _aten.max, _aten.min, _aten.median, _aten.logcumsumexp, _aten._safe_softmax,
)  # fmt: skip
def along_one(op: Operation) -> Outcome | None:
    """Operators along one dim other than the cut one; some have two results."""
    x, dim = op.given["self"], op.given.get("dim")
    cut = op.cut(x)
    if cut is None or not isinstance(dim, int) or dim % len(shape_of(x)) == cut.dim:
        return None
    value = op.node.meta["val"]
    gone = isinstance(value, (list, tuple)) and len(value[0].shape) < len(shape_of(x))
    left = cut.at(cut.dim - (gone and dim % len(shape_of(x)) < cut.dim))
    return op.becomes((left,) * len(value) if isinstance(value, (list, tuple)) else left, self=Want(x, cut))


@rule(_aten.rms_norm)
def rms_normalised(op: Operation) -> Outcome | None:
    """Root mean square norms; over the cut dim, ranks exchange one number per token."""
    x, over, weight = op.given["input"], op.given["normalized_shape"], op.given["weight"]
    cut = op.cut(x)
    if cut is None or cut.dim < len(op.shape) - len(over):
        return normalised(op)
    if len(over) > 1:
        return None
    own = None if weight is None else Want(weight, cut.at(0))
    return Outcome(cut, rms_norm_of_part, (Want(x, cut), own, op.given["eps"], cut.whole, op.axis))


def rms_norm_of_part(x: Tensor, weight: Tensor | None, eps: float | None, width: int, axis: str) -> Tensor:
    """Normalise a part of the features by the mean square of all `width` of them."""
    wide = x if x.dtype.itemsize >= 4 else x.float()
    square = share(add_up(wide.square().sum(-1, keepdim=True), axis), axis)
    made = (wide * torch.rsqrt(square / width + (torch.finfo(x.dtype).eps if eps is None else eps))).to(x.dtype)
    return made if weight is None else made * weight


@rule(_aten.layer_norm)
def normalised(op: Operation) -> Outcome | None:
    """Norms over the last dims, if these are not cut."""
    x, over = op.given["input"], op.given["normalized_shape"]
    cut = op.cut(x)
    return None if cut is None or cut.dim >= len(op.shape) - len(over) else op.becomes(cut, input=Want(x, cut))


@rule(_aten.gather)
def gathered(op: Operation) -> Outcome | None:
    """Elements by index along another dim."""
    x, index = op.given["self"], op.given["index"]
    cut = op.cut(x) or op.cut(index)
    if cut is None or op.given["dim"] % len(op.shape) == cut.dim or shape_of(index)[cut.dim] != cut.whole:
        return None
    return op.becomes(cut, self=Want(x, cut), index=Want(index, cut)) if shape_of(x)[cut.dim] == cut.whole else None


@rule(_aten.glu)
def glu(op: Operation) -> Outcome | None:
    """One half gates the other: along the cut dim, both are parts."""
    x = op.given["self"]
    cut, dim = op.cut(x), op.given["dim"] % len(op.shape)
    if cut is None:
        return None
    if dim != cut.dim:
        return op.becomes(cut, self=Want(x, cut))
    half = parts_between(cut, 0, cut.whole // 2, x)
    return op.becomes(Cut(dim, half), self=Want(x, cut)) if half * 2 == cut.parts else None
