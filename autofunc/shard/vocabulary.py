"""Cross-entropy of logits that are cut along the vocabulary, without putting them together.

Every rank reduces its own columns; two exchanges of a few numbers a token complete them, none in the backward.

Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3 (the fused parallel cross entropy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from autofunc.losses import IGNORED
from autofunc.shard.dtensors import settled


def cross_entropy_sum(logits: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the cross-entropy in nats over all labels that are not -100; the same on every rank.

    Args:
        logits: this rank's columns, floating point, shape (tokens, vocabulary / tp).
        labels: int64, shape (tokens,), in the whole vocabulary; one outside it makes the sum NaN.
        mesh: the tp axis.
    """
    total: Tensor = _CrossEntropy.apply(logits, labels, mesh)  # type: ignore[no-untyped-call]
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
        width = logits.shape[-1]
        own = labels - mesh.get_local_rank() * width
        mine = (own >= 0) & (own < width)
        column = torch.where(mine, own, 0).unsqueeze(-1)
        shifted = logits - _over_ranks(logits.amax(-1), "max", mesh).unsqueeze(-1)
        exponential = shifted.exp()
        picked = torch.where(mine, shifted.gather(-1, column).squeeze(-1), 0.0)
        parts = torch.stack((exponential.sum(-1), picked, mine.to(logits.dtype)))
        total, picked, known = _over_ranks(parts, "sum", mesh).unbind()
        counted = labels != IGNORED
        picked = torch.where(counted & (known == 0), torch.nan, picked)  # a label outside the vocabulary
        ctx.save_for_backward(exponential, total, column, mine & counted, counted)
        return torch.where(counted, total.log() - picked, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        exponential, total, column, mine, counted = ctx.saved_tensors
        probability = exponential * (counted * cotangent / total).unsqueeze(-1)
        return probability.scatter_add(-1, column, (mine * -cotangent).unsqueeze(-1)), None, None


def _over_ranks(local: Tensor, how: str, mesh: DeviceMesh) -> Tensor:
    parts = DTensor.from_local(local, mesh, [Partial(how)], run_check=False)
    return settled(parts.redistribute(placements=[Replicate()]).to_local())
