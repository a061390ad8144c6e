"""Gradient accumulation: one sum per holder, in microbatch order; low-precision gradients accumulate in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autofunc.runtime.program import Layout


class Accumulator:
    """Sums the gradients of one stage's trainable holders over the microbatches of a step.

    It holds memory from its first use on.

    Args:
        layouts: shape and dtype of each holder's sum: fp32 at least.
        device: where they are made.
    """

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        self._layouts, self._device = layouts, device
        self._sums: list[Tensor] = []

    @property
    def sums(self) -> list[Tensor]:
        """One sum per holder, to be added to in place; zeros at first."""
        if not self._sums:
            self._sums = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in self._layouts]
        return self._sums

    def take(self) -> list[Tensor]:
        """The sums, which are no longer held here."""
        sums, self._sums = self.sums, []
        return sums

    @property
    def held(self) -> list[Tensor]:
        """What is in memory now."""
        return self._sums

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one microbatch's gradients.

        Args:
            grads: one of each holder, of its shape and any floating-point dtype; None is a zero.
        """
        for total, grad in zip(self.sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)


class HeldAccumulator(Accumulator):
    """An accumulator whose sums lie in memory that is given, and that others use after it.

    Args:
        memory: one tensor per holder.
        zeroed: whether it holds their sums; else it is filled with zeros at the first use.
    """

    def __init__(self, memory: Sequence[Tensor], *, zeroed: bool = False) -> None:
        self._memory = memory
        self._sums = [*memory] if zeroed else []

    @property
    def sums(self) -> list[Tensor]:
        """See `Accumulator.sums`."""
        if not self._sums:
            for total in self._memory:
                total.zero_()
            self._sums = [*self._memory]
        return self._sums
