"""Tied parameters: who holds each, and the channels by which its holders' sums reach each other.

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
        layouts: by path, shape and dtype of each parameter's sum of gradients, as this process sends it.
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
