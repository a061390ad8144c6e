"""Gradient accumulation over microbatches, and the sum over the holders of a tied parameter.

One accumulator per holder, in microbatch order; low-precision gradients accumulate in fp32. Holders are summed once per
step, in path order, so that every layout gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autofunc.runtime.program import Channel, Layout
from autofunc.schedule import Schedule
from autofunc.splitting import Stage


class Accumulator:
    """Sums the gradients of one stage's trainable holders. It holds memory from the first of them on."""

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
        """Add one microbatch's gradients; None is a zero."""
        for total, grad in zip(self.sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)


@dataclass(frozen=True)
class Tie:
    """A tied parameter: who holds it, and how its holders' sums reach the other ranks."""

    path: str  # canonical
    holders: tuple[tuple[str, int], ...]  # (path, pp rank) in path order
    channels: tuple[Channel, ...]  # one per (holder, other rank), named after the holder

    def ranks(self) -> set[int]:
        """The pp ranks that hold it."""
        return {rank for _, rank in self.holders}


def tie_name(path: str, target: int) -> str:
    """The name of the channel that carries a holder's sum to another rank."""
    return f"tie {path} to rank {target}"


def find_ties(stages: Sequence[Stage], schedule: Schedule, layouts: Mapping[str, Layout]) -> list[Tie]:
    """All trainable parameters with more than one holder, in path order.

    Args:
        stages: all stages.
        schedule: for its placement.
        layouts: of each parameter's sum of gradients, as this process sends it.
    """
    model = stages[0].model
    holders: dict[str, list[tuple[str, int]]] = {}
    for path in model.spec:
        owner = next(stage.index for stage in stages if model.layer_of(path) in stage.layers)
        if model.is_trainable(path):
            holders.setdefault(model.canonical(path), []).append((path, schedule.placement[owner]))
    ties = []
    for canonical, held in sorted(holders.items()):
        if len(held) < 2:
            continue
        ranks = sorted({rank for _, rank in held})
        channels = tuple(
            Channel(tie_name(path, target), source, target, (layouts[canonical],))
            for path, source in held
            for target in ranks
            if target != source
        )
        ties.append(Tie(canonical, tuple(held), channels))
    return ties
