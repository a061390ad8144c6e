"""The memory of receive slots: made once, and used by every step of a pipeline as long as one of its plans needs it."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from autofunc.runtime.program import Layout


class SlotPool:
    """Tensors for the slots of one rank. Plans of one pipeline run one after the other, so they share them.

    The pool itself keeps nothing alive: a slot goes with the last plan that has it.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Layout, torch.device, ref[Tensor]]] = []

    def tensors(self, layouts: Sequence[Layout], device: torch.device) -> list[Tensor]:
        """A tensor for each layout, all distinct."""
        self._made = [entry for entry in self._made if entry[2]() is not None]
        known: dict[Layout, list[Tensor]] = {}
        for layout, where, slot in self._made:
            tensor = slot()
            if tensor is not None and where == device:
                known.setdefault(layout, []).append(tensor)
        found = []
        for layout in layouts:
            if not known.get(layout):
                shape, dtype = layout
                tensor = torch.empty(shape, dtype=dtype, device=device)
                self._made.append((layout, device, ref(tensor)))
                found.append(tensor)
            else:
                found.append(known[layout].pop())
        return found
