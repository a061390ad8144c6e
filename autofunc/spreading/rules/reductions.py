"""Sums, norms, softmax and the like: along dims that are not cut as they are, along the one that is as terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autofunc.spreading.layouts import TERMS, Cut
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
    """A term of a mean: of what each of `size` ranks has, of equally many."""
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
    """Other reductions, over dims that are not cut."""
    x = op.given["self"]
    cut = op.cut(x)
    left = _left(op, cut, _dims(op, x)) if cut is not None else None
    return None if left is None else op.becomes(left, self=Want(x, cut))  # type: ignore[arg-type]


def _dims(op: Operation, x: Any) -> set[int]:
    shape, given = shape_of(x), op.given.get("dim")
    chosen: Any = given if isinstance(given, (list, tuple)) else [given]
    return set(range(len(shape))) if given is None or given == [] else {dim % len(shape) for dim in chosen}


def _left(op: Operation, cut: Cut, dims: set[int]) -> Cut | None:
    """How a reduction over some dims lies; None when the one that is cut is among them."""
    if cut.dim in dims:
        return None
    return cut if op.given.get("keepdim") else cut.at(cut.dim - sum(dim < cut.dim for dim in dims))


@rule(
    _aten.softmax, _aten.log_softmax, _aten._softmax, _aten._log_softmax, _aten.cumsum, _aten.cumprod, _aten.sort,
    _aten.topk, _aten.max, _aten.min, _aten.median, _aten.logcumsumexp, _aten._safe_softmax,
)  # fmt: skip
def along_one(op: Operation) -> Outcome | None:
    """What is done along one dim, beside the one that is cut; some of it makes two values."""
    x, dim = op.given["self"], op.given.get("dim")
    cut = op.cut(x)
    if cut is None or not isinstance(dim, int) or dim % len(shape_of(x)) == cut.dim:
        return None
    value = op.node.meta["val"]
    gone = isinstance(value, (list, tuple)) and len(value[0].shape) < len(shape_of(x))
    left = cut.at(cut.dim - (gone and dim % len(shape_of(x)) < cut.dim))
    return op.becomes((left,) * len(value) if isinstance(value, (list, tuple)) else left, self=Want(x, cut))


@rule(_aten.layer_norm, _aten.rms_norm)
def normalised(op: Operation) -> Outcome | None:
    """Norms over the last dims, which are not cut."""
    x, over = op.given["input"], op.given["normalized_shape"]
    cut = op.cut(x)
    return None if cut is None or cut.dim >= len(op.shape) - len(over) else op.becomes(cut, input=Want(x, cut))


@rule(_aten.gather)
def gathered(op: Operation) -> Outcome | None:
    """Elements by their numbers along another dim."""
    x, index = op.given["self"], op.given["index"]
    cut = op.cut(x) or op.cut(index)
    if cut is None or op.given["dim"] % len(op.shape) == cut.dim or shape_of(index)[cut.dim] != cut.whole:
        return None
    return op.becomes(cut, self=Want(x, cut), index=Want(index, cut)) if shape_of(x)[cut.dim] == cut.whole else None


@rule(_aten.glu)
def glu(op: Operation) -> Outcome | None:
    """One half gates the other: along the dim that is cut, both are parts."""
    x = op.given["self"]
    cut, dim = op.cut(x), op.given["dim"] % len(op.shape)
    if cut is None:
        return None
    if dim != cut.dim:
        return op.becomes(cut, self=Want(x, cut))
    half = parts_between(cut, 0, cut.whole // 2, x)
    return op.becomes(Cut(dim, half), self=Want(x, cut)) if half * 2 == cut.parts else None
