"""Cross-entropy of logits cut along the vocabulary, without gathering them.

Every rank reduces its own columns; two exchanges of a few numbers per token complete them. The backward needs none.

Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3 (the fused parallel cross entropy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autofunc.spreading.axis import Axis, axis_named


def cross_entropy_sum(logits: Tensor, labels: Tensor, axis: Axis, ignored: int) -> Tensor:
    """Return the cross-entropy in nats, summed over all labels that count; the same on every rank.

    Args:
        logits: this rank's columns, floating point, shape (tokens, vocabulary / size).
        labels: int64, shape (tokens,), in the whole vocabulary; one outside it makes the sum NaN.
        axis: along which the vocabulary is cut.
        ignored: the label that does not count.
    """
    total: Tensor = _CrossEntropy.apply(logits, labels, axis, ignored)  # type: ignore[no-untyped-call]
    return total


def cross_entropy_along(logits: Tensor, labels: Tensor, axis: str, ignored: int) -> Tensor:
    """Do the same over the installed axis of this name."""
    total: Tensor = torch.ops.autofunc.cross_entropy_of_parts(logits, labels, axis, ignored)
    return total


# as `autofunc::moved`, see `movements.py`
torch.library.define("autofunc::cross_entropy_of_parts", "(Tensor logits, Tensor labels, str axis, int ignored) -> Tensor")


@torch.library.impl("autofunc::cross_entropy_of_parts", "CompositeImplicitAutograd")
def _sum(logits: Tensor, labels: Tensor, axis: str, ignored: int) -> Tensor:
    return cross_entropy_sum(logits, labels, axis_named(axis), ignored)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axis: Axis, ignored: int) -> Tensor:
        width = logits.shape[-1]
        own = labels - axis.rank * width
        mine = (own >= 0) & (own < width)
        column = torch.where(mine, own, 0).unsqueeze(-1)
        shifted = logits - axis.all_reduce(logits.amax(-1), "max").unsqueeze(-1)
        exponential = shifted.exp()
        picked = torch.where(mine, shifted.gather(-1, column).squeeze(-1), 0.0)
        parts = torch.stack((exponential.sum(-1), picked, mine.to(logits.dtype)))
        total, picked, known = axis.all_reduce(parts, "sum").unbind()
        counted = labels != ignored
        picked = torch.where(counted & (known == 0), torch.nan, picked)  # a label outside the vocabulary
        ctx.save_for_backward(exponential, total, column, mine & counted, counted)
        return torch.where(counted, total.log() - picked, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        exponential, total, column, mine, counted = ctx.saved_tensors
        probability = exponential * (counted * cotangent / total).unsqueeze(-1)
        return probability.scatter_add(-1, column, (mine * -cotangent).unsqueeze(-1)), None, None, None
