"""The memory of receive slots: made once, and used by every step of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autofunc.runtime.program import Layout


class SlotPool:
    """Tensors for the slots of one rank. Plans of one pipeline run one after the other, so they share them."""

    def __init__(self) -> None:
        self._made: dict[tuple[Layout, torch.device], list[Tensor]] = {}

    def tensors(self, layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
        """A tensor for each layout, all distinct."""
        used: dict[Layout, int] = {}
        found = []
        for layout in layouts:
            pool = self._made.setdefault((layout, device), [])
            number = used[layout] = used.get(layout, -1) + 1
            if number == len(pool):
                shape, dtype = layout
                pool.append(torch.empty(shape, dtype=dtype, device=device))
            found.append(pool[number])
        return found
