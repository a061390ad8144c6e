"""Memory at fixed addresses, refilled for each step.

Private parts of torch used, tried with 2.13.0: `torch._foreach_copy_`, one kernel for many tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 128
"""Bytes. No kernel requires more."""


class Fixed:
    """Tensors with the shapes, dtypes, strides and alignment of given ones, in their own memory; `fill` sets their values.

    Strides may be any: of a batch whose rows are in its second dim, or of one row expanded to many. Alignment matters
    because torch picks kernels by it, and different kernels give different bits.

    Args:
        like: strided tensors.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._spans = [_aligned_as(_span(tensor)) for tensor in like]
        self.tensors = [
            span.as_strided(tensor.shape, tensor.stride()) for span, tensor in zip(self._spans, like, strict=True)
        ]

    def fill(self, given: Sequence[Tensor]) -> None:
        """Copy the values of tensors of the same shapes, strides and dtypes."""
        copy_all([_span(tensor) for tensor in given], self._spans)


def copy_all(given: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Copy the values of tensors into others, whose dtypes may differ."""
    if given:
        torch._foreach_copy_([*into], [*given])


def _aligned_as(span: Tensor) -> Tensor:
    """Return new memory of a span's length, with the same address modulo `_ALIGNMENT`."""
    made = span.new_empty(span.numel() + _ALIGNMENT // span.element_size())
    start = (span.data_ptr() - made.data_ptr()) % _ALIGNMENT // span.element_size()
    return made[start : start + span.numel()]


def _span(tensor: Tensor) -> Tensor:
    """Return all memory from a tensor's first element to its last, as a tensor of one dim."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))
