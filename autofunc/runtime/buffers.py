"""The memory of receive slots: allocated once and used by every step of a pipeline, whatever its batch's shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from autofunc.runtime.program import Layout

_MOST_VIEWS = 64  # remembered lists of slots; rebuilding one is cheap


class SlotPool:
    """Memory for the slots of one rank.

    Steps of a pipeline run one after the other, so the slots of all its plans share memory: as many buffers as the largest
    number of slots in a plan, with each plan's largest slot in the first buffer. A buffer that is too small is replaced,
    and no plan keeps the old one: only the pool owns memory.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []  # bytes
        self._views: OrderedDict[tuple[Layout, ...], list[Tensor]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Bytes of memory it holds."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def tensors(self, layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
        """Return a tensor per layout, in disjoint memory, valid during one step."""
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
        """Free all memory."""
        self._buffers, self._views = [], OrderedDict()

    def _made(self, layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layouts]
        largest_first = sorted(range(len(sizes)), key=lambda number: -sizes[number])
        for place, number in enumerate(largest_first):
            if place == len(self._buffers) or self._buffers[place].nbytes < sizes[number]:
                self._views.clear()  # some are views of the buffer being replaced
                self._buffers[place : place + 1] = []  # before allocating the larger one
                self._buffers.insert(place, torch.empty(sizes[number], dtype=torch.uint8, device=device))
        made = {
            number: self._buffers[place][: sizes[number]].view(layouts[number][1]).view(layouts[number][0])
            for place, number in enumerate(largest_first)
        }
        return [made[number] for number in range(len(layouts))]
