"""The memory of receive slots: made once, and used by every step of a pipeline, whatever the shapes of its batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from autofunc.runtime.program import Layout

_MOST_VIEWS = 64  # lists of slots that are remembered; they are cheap to make again


class SlotPool:
    """Memory for the slots of one rank.

    Steps of a pipeline run one after the other, so the slots of all its plans lie in the same memory: as many buffers as
    the plan with most slots has, the largest of each plan in the first. A buffer that is too small is made anew, and no
    plan keeps the old one: the pool alone holds memory.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []  # bytes
        self._views: OrderedDict[tuple[Layout, ...], list[Tensor]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """How much memory it holds."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def tensors(self, layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
        """A tensor for each layout, no two in the same memory, for the time of one step."""
        if self._buffers and self._buffers[0].device != device:
            self.clear()
        key = tuple(layouts)
        if key not in self._views:
            self._views[key] = self._made(key, device)
            while len(self._views) > _MOST_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]

    def clear(self) -> None:
        """Let go of all memory."""
        self._buffers, self._views = [], OrderedDict()

    def _made(self, layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layouts]
        largest_first = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        for place, number in enumerate(largest_first):
            if place == len(self._buffers) or self._buffers[place].nbytes < sizes[number]:
                self._views.clear()  # some lie in the buffer that goes
                self._buffers[place : place + 1] = []  # before the larger one is made
                self._buffers.insert(place, torch.empty(sizes[number], dtype=torch.uint8, device=device))
        made = {
            number: self._buffers[place][: sizes[number]].view(layouts[number][1]).view(layouts[number][0])
            for place, number in enumerate(largest_first)
        }
        return [made[number] for number in range(len(layouts))]
