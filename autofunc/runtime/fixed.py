"""Memory that stays where it is, and is filled anew for each step.

Private parts of torch used, tried with 2.13.0: `torch._foreach_copy_`, one kernel for many tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 128
"""Bytes. No kernel asks for more."""


class Fixed:
    """Tensors like some others, in memory of their own.

    They have the strides of the others, whatever these are: the rows of a batch that has them in its second dim, or one
    row that stands for many. They begin at such addresses, too: kernels are chosen by how memory is aligned, and others
    give other bits.

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
    """Copy the values of some tensors into others, whose dtypes may be others too."""
    if given:
        torch._foreach_copy_([*into], [*given])


def _aligned_as(span: Tensor) -> Tensor:
    """Memory as long as a span, which begins as far from a multiple of `_ALIGNMENT`."""
    made = span.new_empty(span.numel() + _ALIGNMENT // span.element_size())
    start = (span.data_ptr() - made.data_ptr()) % _ALIGNMENT // span.element_size()
    return made[start : start + span.numel()]


def _span(tensor: Tensor) -> Tensor:
    """All memory from a tensor's first element to its last, with a dim."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,))
