"""Checks that the losses of steps had a weight above 0, done once the device is ready, so that the host never waits."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from autofunc.errors import BatchError
from autofunc.losses import NO_WEIGHT


class _Asked(NamedTuple):
    """The total weight of a step's loss, on its way to the host."""

    step: int
    weight: Tensor
    is_there: torch.Event | None  # set on arrival; None if the weight is already on the host


class WeightCheck:
    """Refuses steps whose total weight is 0: on CPU at once, on an accelerator in a later step.

    Their loss is NaN and their gradients are zero, so the delay does no harm.
    """

    def __init__(self) -> None:
        self._asked: deque[_Asked] = deque()

    def add(self, step: int, weight: Tensor) -> None:
        """Remember a step.

        Args:
            step: its number.
            weight: total weight of its loss, over all microbatches and ranks, 0-dim.
        """
        if weight.device.type == "cpu":
            self._asked.append(_Asked(step, weight, None))
            return
        copy = torch.empty((), dtype=weight.dtype, pin_memory=True).copy_(weight, non_blocking=True)
        event = torch.Event(weight.device)
        event.record()
        self._asked.append(_Asked(step, copy, event))

    def raise_if_nothing_weighed(self) -> None:
        """Check the steps whose weight has arrived.

        Raises:
            BatchError: for a step whose weight is 0.
        """
        while self._asked and (self._asked[0].is_there is None or self._asked[0].is_there.query()):
            asked = self._asked.popleft()
            if not asked.weight:
                raise BatchError(f"step {asked.step}: {NO_WEIGHT}")
