"""Who waits for whom: the values of a schedule as arrays over the actions of all ranks, concatenated.

The validator and the simulator read these instead of visiting actions one by one, so that a schedule of millions of
actions takes seconds. `effects.py` tells what one action reads and writes; here the same table is applied to all
microbatches of an edge at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autofunc.schedule.effects import Activation, BackwardResiduals, Cotangent, Edge, Token, WeightResiduals, flow_of
from autofunc.schedule.ir import Kind, Schedule, is_transfer

Indices = npt.NDArray[np.int32]
"""Positions in the flat table of all actions; -1 for no action."""


class Bundle(NamedTuple):
    """One kind of value of one stage or edge, for all microbatches, with the actions that make and read it."""

    token: Callable[..., Token]  # kind of value
    ends: tuple[int, ...]  # the token's stages
    maker: Indices  # per microbatch
    reader: Indices  # per microbatch

    def of(self, microbatch: int) -> Token:
        """The value of one microbatch."""
        return self.token(*self.ends, microbatch)


class Crossing(NamedTuple):
    """A bundle that goes from one rank to another, along a directed edge between their stages."""

    bundle: Bundle
    source: int  # stage
    target: int  # stage
    send: Indices  # per microbatch; in compute form, the maker
    receive: Indices  # per microbatch; empty in compute form


@dataclass(frozen=True)
class Network:
    """All values of a schedule: those that stay on a rank, and those that cross to another."""

    schedule: Schedule
    first: npt.NDArray[np.int64]  # per rank, where its row begins in `table`; one more for the end
    local: tuple[Bundle, ...]  # values that stay on a rank
    crossings: tuple[Crossing, ...]  # values that change ranks

    @cached_property
    def table(self) -> npt.NDArray[np.int32]:
        """The rows of all ranks, concatenated. Large, so made on demand."""
        return np.concatenate([row.table for row in self.schedule])

    @property
    def num_actions(self) -> int:
        """Number of actions on all ranks together."""
        return int(self.first[-1])

    def locate(self, flat: int) -> tuple[int, int]:
        """Return the (rank, position in its row) of an action."""
        rank = int(np.searchsorted(self.first, flat, side="right")) - 1
        return rank, flat - int(self.first[rank])

    def by_rank(self, values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
        """Split values of the flat table into rows."""
        return tuple(np.split(values, self.first[1:-1]))

    def describe(self, flat: int) -> str:
        """Rank, position and action, for messages."""
        rank, position = self.locate(flat)
        return f"rank {rank}, position {position}, {self.schedule[rank][position]}"


def build_network(schedule: Schedule, edges: Sequence[Edge] | None, found: Indices | None = None) -> Network:
    """Find the maker and the reader of every value along edges (None: a chain).

    It is the validator that refuses missing and doubled actions.

    Args:
        schedule: in any form.
        edges: connections between stages.
        found: `computations(schedule)`, if known already.
    """
    flow = flow_of(schedule, edges)
    forward, both, split, weight = computations(schedule) if found is None else found
    backward: Indices = np.maximum(both, split)
    find = _Transfers(schedule)
    local: list[Bundle] = []
    crossings: list[Crossing] = []
    if not flow.forward_only:
        for stage in range(schedule.num_stages):
            local.append(Bundle(BackwardResiduals, (stage,), forward[stage], backward[stage]))
            if (split[stage] >= 0).any() or (weight[stage] >= 0).any():
                local.append(Bundle(WeightResiduals, (stage,), split[stage], weight[stage]))
    for producer, consumer, needs_grad in flow.edges:
        values = [Bundle(Activation, (producer, consumer), forward[producer], forward[consumer])]
        if needs_grad and not flow.forward_only:
            values.append(Bundle(Cotangent, (consumer, producer), backward[consumer], backward[producer]))
        if schedule.placement[producer] == schedule.placement[consumer]:
            local += values
        else:
            crossings += [_crossing(schedule, bundle, find) for bundle in values]
    first = np.concatenate(([0], np.cumsum([len(row) for row in schedule])))
    return Network(schedule, first, tuple(local), tuple(crossings))


def computations(schedule: Schedule) -> Indices:
    """Locate each computation in the flat table: int32 of shape (4, stages, microbatches), by kind F, B, I and W."""
    found: Indices = np.full((4, schedule.num_stages, schedule.num_microbatches), -1, np.int32)
    first = 0
    for row in schedule:  # row by row, so that the working set stays in the cache
        stage, kind, microbatch, _ = row.table.T
        if kind.max(initial=Kind.F) <= Kind.W:
            found[kind, stage, microbatch] = np.arange(first, first + len(row), dtype=np.int32)
        else:
            position = np.flatnonzero(kind <= Kind.W)
            found[kind[position], stage[position], microbatch[position]] = first + position
        first += len(row)
    return found


def by_action(pairs: Iterable[tuple[Indices, Indices]], num_actions: int, padding: int) -> list[Indices]:
    """Collect each action's numbers in as few arrays as possible: int32 of shape (num_actions,), padded with `padding`.

    Args:
        pairs: actions, each at most once per pair, and a number for each; action -1 is skipped.
        num_actions: length of the flat table.
        padding: a number that none of the given ones equals.
    """
    slots: list[Indices] = [np.full(num_actions, padding, np.int32)]
    for actions, numbers in pairs:
        left = actions >= 0
        level = 0
        while left.any():
            if level == len(slots):
                slots.append(np.full(num_actions, padding, np.int32))
            now = left & (slots[level][actions] == padding)
            slots[level][actions[now]] = numbers[now]
            left &= ~now
            level += 1
    return slots


def _crossing(schedule: Schedule, bundle: Bundle, find: _Transfers) -> Crossing:
    source, target = bundle.ends
    if not schedule.is_lowered:
        return Crossing(bundle, source, target, bundle.maker, np.empty(0, np.int32))
    is_forward = bundle.token is Activation
    send = find(Kind.SEND_F if is_forward else Kind.SEND_B, source, target)
    receive = find(Kind.RECV_F if is_forward else Kind.RECV_B, target, source)
    return Crossing(bundle, source, target, send, receive)


class _Transfers:
    """Positions of sends and receives in the flat table, by kind and edge."""

    def __init__(self, schedule: Schedule) -> None:
        self._num_microbatches = schedule.num_microbatches
        self._groups: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}
        if schedule.is_lowered:
            self._table = table = np.concatenate([row.table for row in schedule])
            transfers = np.flatnonzero(is_transfer(table))
            keys = table[transfers][:, (1, 0, 3)]
            order = np.lexsort(keys.T)
            if len(order):
                edges = np.flatnonzero(np.any(np.diff(keys[order], axis=0), axis=1)) + 1
                for group in np.split(transfers[order], edges):
                    kind, stage, peer = (int(part) for part in table[group[0]][[1, 0, 3]])
                    self._groups[kind, stage, peer] = group

    def __call__(self, kind: Kind, stage: int, peer: int) -> Indices:
        """Return positions by microbatch: int32 of shape (microbatches,)."""
        found: Indices = np.full(self._num_microbatches, -1, np.int32)
        group = self._groups.get((int(kind), stage, peer), np.empty(0, np.int64))
        found[self._table[group, 2]] = group
        return found
