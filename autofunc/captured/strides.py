"""Operators that depend on the strides of their operands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_strided_as_captured(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None, captured: Sequence[int]
) -> Tensor:
    """Apply `as_strided` to a tensor that had other strides, and memory of its own, when it was captured."""
    if tuple(x.stride()) != tuple(captured) or x.storage_offset():
        x = torch.empty_strided(x.shape, captured, dtype=x.dtype, device=x.device).copy_(x)
    return x.as_strided(size, stride, offset)
