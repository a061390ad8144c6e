"""Tied parameters: who holds each, and which sums of its holders are exchanged.

Holders are summed once per step, in path order (see `finish.exchange_ties`), so that every layout gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autofunc.runtime.program import Channel, Layout
from autofunc.schedule import Schedule
from autofunc.splitting import Stage


@dataclass(frozen=True)
class Tie:
    """A tied parameter: its holders, and the layout of their sums."""

    path: str  # canonical
    holders: tuple[tuple[str, int], ...]  # (path, pp rank) in path order
    layout: Layout

    def ranks(self) -> list[int]:
        """Return the pp ranks that hold it, in order."""
        return sorted({rank for _, rank in self.holders})

    def transfers(self) -> list[tuple[str, Channel]]:
        """Return (path of the holder, channel) of each sum sent: to all other ranks, in the same order on both ends."""
        return [
            (path, Channel(owner, target)) for path, owner in self.holders for target in self.ranks() if target != owner
        ]

    def channels(self) -> set[Channel]:
        """Return the channels that sums are sent along."""
        return {channel for _, channel in self.transfers()}


def find_ties(stages: Sequence[Stage], schedule: Schedule, layouts: Mapping[str, Layout]) -> list[Tie]:
    """Return all trainable parameters with more than one holder, in path order.

    Args:
        stages: all stages.
        schedule: for its placement.
        layouts: shape and dtype of each parameter's gradient sum as this process sends it, by path.
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
        ties.append(Tie(canonical, tuple(held), layouts[canonical]))
    return ties
