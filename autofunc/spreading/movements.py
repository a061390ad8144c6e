"""Moves from one layout to another, as differentiable functions: a graph over ranks has them between its operators.

Each names the axis it moves values along; see `axis`. The gradient moves the other way: the conjugate pairs of Shoeybi
et al., "Megatron-LM", arXiv 1909.08053, section 3, and of Korthikanti et al., "Reducing Activation Recomputation", arXiv
2205.05198, section 4.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc.spreading.axis import Axis, axis_named
from autofunc.spreading.layouts import Cut, piece_of, put_together


def share(x: Tensor, axis: str) -> Tensor:
    """Return the value itself; from here on each rank uses it with its part of something else, so gradients are summed."""
    return _moved(x, axis, None, "same", "sum")


def add_up(x: Tensor, axis: str) -> Tensor:
    """Return the sum of everyone's term."""
    return _moved(x, axis, None, "sum", "same")


def add_up_into(x: Tensor, axis: str, dim: int, parts: tuple[int, ...]) -> Tensor:
    """Return this rank's part of the sum of everyone's term."""
    return _moved(x, axis, Cut(dim, tuple(parts)), "scatter", "gather")


def gather(x: Tensor, axis: str, dim: int, parts: tuple[int, ...]) -> Tensor:
    """Return the whole of a cut value, which all ranks use alike."""
    return _moved(x, axis, Cut(dim, tuple(parts)), "gather", "piece")


def gather_to_share(x: Tensor, axis: str, dim: int, parts: tuple[int, ...]) -> Tensor:
    """Return the whole of a cut value, which each rank uses with its part of something else."""
    return _moved(x, axis, Cut(dim, tuple(parts)), "gather", "scatter")


def handed_out(x: Tensor, axis: str, dim: int) -> Tensor:
    """Return a cut value as the caller of the forward gets it."""
    return axis_named(axis).handed_out(x, dim)


def piece_of_same(x: Tensor, axis: str, dim: int, parts: tuple[int, ...]) -> Tensor:
    """Return this rank's part of a value whose gradient every rank needs whole."""
    return _moved(x, axis, Cut(dim, tuple(parts)), "piece", "gather")


def piece_of_shared(x: Tensor, axis: str, dim: int, parts: tuple[int, ...]) -> Tensor:
    """Return this rank's part of a value whose gradient stays in terms: nothing is exchanged."""
    found = axis_named(axis)
    return piece_of(x, Cut(dim, tuple(parts)), found.size, found.rank)


def first_gradient(x: Tensor, axis: str) -> Tensor:
    """Return the value itself; all ranks use it alike from here on, so only the first rank's gradient is kept."""
    return _moved(x, axis, None, "same", "first")


def on_first(x: Tensor, axis: str) -> Tensor:
    """Return the value as a term of a sum: itself on the first rank, zeros on the others."""
    return x * float(axis_named(axis).rank == 0)


def _moved(x: Tensor, axis: str, cut: Cut | None, forth: str, back: str) -> Tensor:
    dim, parts = (cut.dim, list(cut.parts)) if cut is not None else (-1, [])
    moved: Tensor = torch.ops.autofunc.moved(x, axis, dim, parts, forth, back)
    return moved


# a single operator when recorded above autograd, so that the graph keeps its gradient; below, its decomposition
torch.library.define("autofunc::moved", "(Tensor x, str axis, int dim, int[] parts, str forth, str back) -> Tensor")


@torch.library.impl("autofunc::moved", "CompositeImplicitAutograd")
def _move(x: Tensor, axis: str, dim: int, parts: Sequence[int], forth: str, back: str) -> Tensor:
    cut = Cut(dim, tuple(parts)) if parts else None
    moved: Tensor = _Move.apply(x, axis_named(axis), cut, forth, back)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, cut: Cut | None, forth: str, back: str) -> Tensor:
        ctx.axis, ctx.cut, ctx.back = axis, cut, back
        return x.view_as(x) if forth == "same" else _exchanged(x, axis, cut, forth)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(cotangent, ctx.axis, ctx.cut, ctx.back), None, None, None, None


def _exchanged(x: Tensor, axis: Axis, cut: Cut | None, how: str) -> Tensor:
    if how == "same":
        return x
    if how == "first":
        return x * float(axis.rank == 0)
    if how == "sum":
        return axis.all_reduce(x.contiguous(), "sum")
    assert cut is not None
    if how == "piece":
        return piece_of(x, cut, axis.size, axis.rank).contiguous()
    if how == "gather":
        return put_together(axis.all_gather(x.contiguous()).chunk(axis.size), cut)
    return axis.reduce_scatter(torch.cat([piece_of(x, cut, axis.size, rank) for rank in range(axis.size)]))
