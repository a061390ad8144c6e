"""The flat program of one rank: everything that can be resolved before the first step.

A lowered row becomes one op (see `ops.py`) for each action. A register holds one value (see `schedule/effects.py`) from
the op that writes it to the op that reads it, which frees it. A slot is memory that a receive writes into. It is in use
from the receive to the last op that reads the received value, also as residuals, and then goes to the next receive of its
shape: there are as many as are in use at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from autofunc.runtime.ops import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Gather,
    Op,
    Receive,
    Reduce,
    Release,
    Send,
)
from autofunc.schedule import Action, Dataflow, Edge, Kind, Schedule, StageBytes
from autofunc.schedule.effects import Activation, EdgeToken, Effect, Token, carried_by
from autofunc.schedule.ir import OVERLAPPED
from autofunc.splitting import Boundaries

Shape = tuple[int, ...]
Layout = tuple[Shape, torch.dtype]

PLACE_BYTES = 48
"""Bytes that a place in a program is written in, for other processes to read."""


class Channel(NamedTuple):
    """The one-way channel from a pp rank to another, for all their stages. Messages arrive in the order they were sent."""

    source: int  # pp rank
    target: int  # pp rank


@dataclass(frozen=True)
class Program:
    """All ops of one rank in a step."""

    rank: int
    ops: tuple[Op, ...]
    channels: tuple[Channel, ...]  # of this rank
    slots: tuple[Layout, ...]
    num_registers: int
    num_sends: int
    schedule: Schedule  # lowered; for messages

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Names of a rank's positions: before and in each action, alternately, and after the last."""
        return (
            *(text for action in self.schedule[self.rank] for text in (f"before {action}", f"in {action}")),
            "after all",
        )

    @cached_property
    def encoded_places(self) -> tuple[bytes, ...]:
        """The `places`, each in PLACE_BYTES."""
        return tuple(text.encode()[:PLACE_BYTES].ljust(PLACE_BYTES) for text in self.places)


StagePair = tuple[int, int]
"""(stage that sends, stage that receives), forward or back along an edge."""


def message_layouts(schedule: Schedule, boundaries: Boundaries) -> dict[StagePair, tuple[Layout, ...]]:
    """Return the layouts of each message between stages on different ranks."""
    layouts = {}
    for edge in boundaries.edges():
        if schedule.placement[edge.producer] == schedule.placement[edge.consumer]:
            continue
        values = boundaries.stages[edge.producer].values
        back = tuple(value for value in values if value.needs_grad)
        for sender, receiver, carried in (
            (edge.producer, edge.consumer, values),
            (edge.consumer, edge.producer, back),
        ):
            if carried:
                layouts[sender, receiver] = tuple((value.shape, value.dtype) for value in carried)
    return layouts


def channels_between(schedule: Schedule, pairs: Iterable[StagePair]) -> tuple[Channel, ...]:
    """Return the channels that carry messages between these stages, sorted."""
    placement = schedule.placement
    return tuple(sorted({Channel(placement[sender], placement[receiver]) for sender, receiver in pairs}))


def build_program(
    schedule: Schedule,
    rank: int,
    edges: Sequence[Edge],
    layouts: Mapping[StagePair, tuple[Layout, ...]],
    keeps: Mapping[int, StageBytes],
    settled: Mapping[int, Sequence[int]],
) -> Program:
    """Compile one rank's lowered row.

    Args:
        schedule: lowered.
        rank: the pp rank.
        edges: connections between stages.
        layouts: of all messages in the pipeline, see `message_layouts`.
        keeps: by local stage, which received values its residuals hold.
        settled: this rank's entry of `schedule.settled_sends`.
    """
    row = list(schedule[rank])
    builder = _Builder(Dataflow(edges, schedule.is_forward_only), schedule, rank, layouts, _Slots(row, keeps), settled)
    ops = tuple(builder.op(position, action) for position, action in enumerate(row))
    slots, registers = tuple(builder.slots.layouts), builder.registers.count
    return Program(rank, ops, builder.own, slots, registers, len(builder.sends), schedule)


class _Builder:
    """Makes the ops of one row, given its actions in order."""

    def __init__(
        self,
        flow: Dataflow,
        schedule: Schedule,
        rank: int,
        layouts: Mapping[StagePair, tuple[Layout, ...]],
        slots: _Slots,
        settled: Mapping[int, Sequence[int]],
    ) -> None:
        self.own = tuple(channel for channel in channels_between(schedule, layouts) if rank in channel)
        self.slots, self.registers = slots, _Registers()
        self.sends: dict[int, int] = {}  # position of a SEND -> its number
        self._flow, self._placement, self._layouts, self._settled = flow, schedule.placement, layouts, settled
        self._in_flight: set[int] = set()  # registers that a receive will fill

    def op(self, position: int, action: Action) -> Op:
        """Make the op of the next action."""
        stage, kind, microbatch, peer = action
        effect = self._flow.effect(action)
        if kind.is_compute:
            return self._computation(position, action, effect)
        if kind.is_send:
            (register,) = self.registers.read(effect.reads)
            number = self.sends[position] = len(self.sends)
            return Send(position, stage, microbatch, register, self._number(stage, peer), number)
        if kind.is_receive:
            (register,) = self.registers.write(effect.writes)
            self._in_flight.add(register)
            slots = self.slots.take(position, carried_by(action), self._layouts[peer, stage])
            return Receive(position, stage, microbatch, register, self._number(peer, stage), slots)
        if kind is Kind.UNSHARD:
            return Gather(position, stage)
        return Release(position, stage) if kind is Kind.RESHARD else Reduce(position, stage)

    def _computation(self, position: int, action: Action, effect: Effect) -> Op:
        stage, kind, microbatch, peer = action
        used, given = _split(effect.reads)
        kept, made = _split(effect.writes)
        residuals, reads = self.registers.read(used), self.registers.read(given)
        writes, keeps = self.registers.write(made), self.registers.write(kept)
        waits = tuple(register for register in reads if register in self._in_flight)
        self._in_flight.difference_update(waits)
        settles = tuple(self.sends[earlier] for earlier in self._settled.get(position, ()))
        if kind is Kind.F:
            kept_in, beside = keeps[0] if keeps else None, peer == OVERLAPPED
            return Forward(position, stage, microbatch, reads, writes, kept_in, waits, settles, beside)
        if kind is Kind.B:
            return Backward(position, stage, microbatch, residuals[0], reads, writes, waits, settles)
        if kind is Kind.I:
            return BackwardInput(position, stage, microbatch, residuals[0], reads, writes, keeps[0], waits, settles)
        return BackwardWeight(position, stage, microbatch, residuals[0])

    def _number(self, sender: int, receiver: int) -> int:
        """Return the index, among this rank's channels, of the one between two stages."""
        return self.own.index(Channel(self._placement[sender], self._placement[receiver]))


def _split(tokens: Sequence[Token]) -> tuple[list[Token], list[Token]]:
    """Split tokens into residuals and values that cross between stages."""
    crossing: list[Token] = [token for token in tokens if isinstance(token, EdgeToken)]
    return [token for token in tokens if token not in crossing], crossing


class _Registers:
    """Allocates registers: as many as there are values at once."""

    def __init__(self) -> None:
        self.count = 0
        self._of: dict[Token, int] = {}
        self._free: list[int] = []

    def read(self, tokens: Sequence[Token]) -> tuple[int, ...]:
        """Return the registers of these values, and free them."""
        found = tuple(self._of.pop(token) for token in tokens)
        self._free += found
        return found

    def write(self, tokens: Sequence[Token]) -> tuple[int, ...]:
        """Allocate a register for each of these values."""
        return tuple(self._take(token) for token in tokens)

    def _take(self, token: Token) -> int:
        if not self._free:
            self._free.append(self.count)
            self.count += 1
        self._of[token] = self._free.pop()
        return self._of[token]


class _Slots:
    """Allocates slots in the order of the receives, which takes as few as possible: the most in use at once."""

    def __init__(self, row: list[Action], keeps: Mapping[int, StageBytes]) -> None:
        self.layouts: list[Layout] = []
        self._keeps = keeps
        self._free_at: list[int] = []  # by slot: the position after which it is free
        self._at = {(action.kind, action.stage, action.microbatch): position for position, action in enumerate(row)}

    def take(self, position: int, token: EdgeToken, layouts: Sequence[Layout]) -> tuple[int, ...]:
        """Allocate slots for the tensors of a receive."""
        return tuple(self._take(position, self._last_read(token, number), layout) for number, layout in enumerate(layouts))

    def _take(self, position: int, last: int, layout: Layout) -> int:
        for slot, (known, free_at) in enumerate(zip(self.layouts, self._free_at, strict=True)):
            if known == layout and free_at < position:
                self._free_at[slot] = last
                return slot
        self.layouts.append(layout)
        self._free_at.append(last)
        return len(self.layouts) - 1

    def _last_read(self, token: EdgeToken, number: int) -> int:
        """Find the position where a tensor of a received message, given by its index, is read last."""
        stage, keeps = token.target, self._keeps[token.target]
        if isinstance(token, Activation):
            readers = [Kind.F]
            for_backward, for_weights = number in keeps.kept_inputs, number in keeps.weight_inputs
            readers += [Kind.B, Kind.I] if for_backward or for_weights else []
        else:
            readers = [Kind.B, Kind.I]
            for_weights = number in keeps.weight_cotangents
        readers += [Kind.W] if for_weights else []
        return max(self._at.get((kind, stage, token.microbatch), -1) for kind in readers)
