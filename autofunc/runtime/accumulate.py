"""Gradient accumulation: one sum per holder, in microbatch order; low-precision gradients accumulate in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autofunc.runtime.program import Layout


class Accumulator:
    """Sums the gradients of one stage's trainable holders over the microbatches of a step.

    It allocates memory at its first use.

    Args:
        layouts: shape and dtype of each holder's sum: at least fp32.
        device: of the sums.
    """

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        self._layouts, self._device = layouts, device
        self._sums: list[Tensor] = []

    @property
    def sums(self) -> list[Tensor]:
        """One sum per holder, for in-place addition; initially zeros."""
        if not self._sums:
            self._sums = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in self._layouts]
        return self._sums

    def take(self) -> list[Tensor]:
        """Return the sums and give up ownership of them."""
        sums, self._sums = self.sums, []
        return sums

    @property
    def held(self) -> list[Tensor]:
        """The sums currently in memory; empty before the first use."""
        return self._sums

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one microbatch's gradients.

        Args:
            grads: one per holder, of its shape and any floating-point dtype; None counts as zero.
        """
        for total, grad in zip(self.sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)


class HeldAccumulator(Accumulator):
    """An accumulator whose sums live in given memory, which others use after it.

    Args:
        memory: one tensor per holder.
        zeroed: True if the memory already holds valid sums; else it is zeroed at the first use.
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
