"""The flat program of one rank: everything that can be resolved before the first step is resolved here.

A lowered row becomes a list of `Op`s whose operands are numbers: of registers, slots, channels and sends. A register holds
the tensors of one value (see `schedule/effects.py`) from the op that writes it to the op that reads it, which frees it. A
slot is memory that a receive writes into. It is taken from the receive to the last op that reads what was received, be it
as residuals, and given to the next receive of that shape: there are as many as are in use at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from autofunc.schedule import Action, Dataflow, Edge, Kind, Schedule, StageBytes
from autofunc.schedule.effects import Activation, EdgeToken, Token, carried_by
from autofunc.splitting import Boundaries

Shape = tuple[int, ...]
Layout = tuple[Shape, torch.dtype]


class Channel(NamedTuple):
    """A directed edge between two pp ranks: its messages arrive in the order in which they were sent."""

    name: str
    source: int  # pp rank
    target: int  # pp rank
    layouts: tuple[Layout, ...]  # of each tensor of a message


class Op(NamedTuple):
    """One instruction of a rank."""

    kind: Kind
    stage: int
    microbatch: int
    reads: tuple[int, ...]  # registers, freed afterwards; the residuals come first
    writes: tuple[int, ...]
    waits: tuple[int, ...]  # those of `reads` in which a receive is in flight
    settles: tuple[int, ...]  # sends that what is waited for proves complete, by number
    channel: int  # number of the rank's channel, or -1
    send: int  # number of this send, or -1
    slots: tuple[int, ...]  # where a receive writes its tensors
    position: int  # in the lowered row


@dataclass(frozen=True)
class Program:
    """What one rank does in a step."""

    rank: int
    ops: tuple[Op, ...]
    channels: tuple[Channel, ...]  # of this rank
    slots: tuple[Layout, ...]
    num_registers: int
    num_sends: int
    schedule: Schedule  # lowered; for messages


def edge_channels(schedule: Schedule, boundaries: Boundaries) -> dict[tuple[int, int], Channel]:
    """The channels of all edges between different ranks, by (sending stage, receiving stage), forward and back."""
    channels = {}
    for edge in boundaries.edges():
        source, target = schedule.placement[edge.producer], schedule.placement[edge.consumer]
        if source == target:
            continue
        values = boundaries.stages[edge.producer].values
        back = tuple(value for value in values if value.needs_grad)
        for sender, receiver, carried in (
            (edge.producer, edge.consumer, values),
            (edge.consumer, edge.producer, back),
        ):
            if carried:
                channels[sender, receiver] = Channel(
                    f"stage {sender} to {receiver}",
                    schedule.placement[sender],
                    schedule.placement[receiver],
                    tuple((value.shape, value.dtype) for value in carried),
                )
    return channels


def build_program(
    schedule: Schedule,
    rank: int,
    edges: Sequence[Edge],
    channels: Mapping[tuple[int, int], Channel],
    keeps: Mapping[int, StageBytes],
    settled: Mapping[int, Sequence[int]],
) -> Program:
    """Compile one rank's lowered row.

    Args:
        schedule: lowered.
        rank: whose row.
        edges: connections between stages.
        channels: of the whole pipeline, see `edge_channels`.
        keeps: by local stage: which received values its residuals hold.
        settled: of this rank, see `schedule.settled_sends`.
    """
    flow = Dataflow(edges, schedule.is_forward_only)
    slots = _Slots(list(schedule[rank]), keeps)
    own = list(dict.fromkeys(channel for channel in channels.values() if rank in (channel.source, channel.target)))
    register_of: dict[Token, int] = {}
    in_flight: set[int] = set()  # registers that a receive will fill
    free: list[int] = []
    ops: list[Op] = []
    num_registers = 0
    sends: dict[int, int] = {}  # position of a SEND -> its number
    for position, action in enumerate(schedule[rank]):
        effect = flow.effect(action)
        reads = tuple(register_of.pop(token) for token in effect.reads)
        waits = tuple(register for register in reads if register in in_flight)
        in_flight.difference_update(waits)
        free += reads
        writes = []
        for token in effect.writes:
            if not free:
                free.append(num_registers)
                num_registers += 1
            register_of[token] = free.pop()
            writes.append(register_of[token])
        channel, send = -1, -1
        into: tuple[int, ...] = ()
        if action.kind.is_receive:
            channel = own.index(channels[action.peer, action.stage])
            in_flight.add(writes[0])
            into = slots.take(position, carried_by(action), own[channel].layouts)
        elif action.kind.is_send:
            channel = own.index(channels[action.stage, action.peer])
            send = sends[position] = len(sends)
        settles = tuple(sends[earlier] for earlier in settled.get(position, ()))
        stage, kind, microbatch = action.stage, action.kind, action.microbatch
        ops.append(
            Op(kind, stage, microbatch, reads, tuple(writes), waits, settles, channel, send, into, position)
        )  # fmt: skip
    return Program(rank, tuple(ops), tuple(own), tuple(slots.layouts), num_registers, len(sends), schedule)


class _Slots:
    """Hands out slots in the order of the receives: with intervals that is as few as can be in use at once."""

    def __init__(self, row: list[Action], keeps: Mapping[int, StageBytes]) -> None:
        self.layouts: list[Layout] = []
        self._keeps = keeps
        self._free_at: list[int] = []  # by slot: the position after which it may be taken again
        self._at = {(action.kind, action.stage, action.microbatch): position for position, action in enumerate(row)}

    def take(self, position: int, token: EdgeToken, layouts: Sequence[Layout]) -> tuple[int, ...]:
        """Slots for what a receive brings."""
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
        """Where the value with this number in a received message is read last."""
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
