"""The flat program of one rank: everything that can be resolved before the first step is resolved here.

A lowered row becomes a list of `Op`s whose operands are numbers of registers. A register holds the tensors of one value
(see `schedule/effects.py`) from the op that writes it to the op that reads it, which frees it. Registers are reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from autofunc.schedule import Dataflow, Edge, Kind, Schedule
from autofunc.schedule.effects import Token
from autofunc.splitting import Boundaries


class Channel(NamedTuple):
    """A directed edge between two pp ranks: its messages arrive in the order in which they were sent."""

    name: str
    source: int  # pp rank
    target: int  # pp rank
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


class Op(NamedTuple):
    """One instruction of a rank."""

    kind: Kind
    stage: int
    microbatch: int
    reads: tuple[int, ...]  # registers, freed afterwards; the residuals come first
    writes: tuple[int, ...]
    waits: tuple[int, ...]  # those of `reads` in which a receive is in flight
    settles: tuple[int, ...]  # sends that what is waited for proves complete, by number
    channel: Channel | None
    send: int  # number of this send, or -1
    position: int  # in the lowered row


@dataclass(frozen=True)
class Program:
    """What one rank does in a step."""

    rank: int
    ops: tuple[Op, ...]
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
                    tuple(value.shape for value in carried),
                    tuple(value.dtype for value in carried),
                )
    return channels


def build_program(
    schedule: Schedule, rank: int, edges: Sequence[Edge], channels: dict[tuple[int, int], Channel]
) -> Program:
    """Compile one rank's lowered row."""
    flow = Dataflow(edges, schedule.is_forward_only)
    traffic = _Traffic(schedule, flow)
    register_of: dict[Token, int] = {}
    in_flight: dict[int, Token] = {}  # register -> what a receive is bringing into it
    free: list[int] = []
    ops: list[Op] = []
    num_registers = num_sends = 0
    unsettled: dict[int, list[tuple[int, Token]]] = {}  # by rank that receives: sends not known to be complete
    for position, action in enumerate(schedule[rank]):
        effect = flow.effect(action)
        reads = tuple(register_of.pop(token) for token in effect.reads)
        waits = tuple(register for register in reads if register in in_flight)
        settles: list[int] = []
        for register in waits:
            sender, sent_at = traffic.sent[in_flight.pop(register)]
            waiting = unsettled.get(sender, [])
            proven = [(number, token) for number, token in waiting if traffic.read_at[token] < sent_at]
            settles += [number for number, _ in proven]
            unsettled[sender] = [send for send in waiting if send not in proven]
        free += reads
        writes = []
        for token in effect.writes:
            if not free:
                free.append(num_registers)
                num_registers += 1
            register_of[token] = free.pop()
            writes.append(register_of[token])
        channel, send = None, -1
        if action.kind.is_receive:
            channel = channels[action.peer, action.stage]
            in_flight[writes[0]] = effect.writes[0]
        elif action.kind.is_send:
            channel = channels[action.stage, action.peer]
            send, num_sends = num_sends, num_sends + 1
            unsettled.setdefault(schedule.placement[action.peer], []).append((send, effect.reads[0]))
        stage, kind, microbatch = action.stage, action.kind, action.microbatch
        ops.append(Op(kind, stage, microbatch, reads, tuple(writes), waits, tuple(settles), channel, send, position))
    return Program(rank, tuple(ops), num_registers, num_sends, schedule)


class _Traffic:
    """Where every value that travels is sent and read.

    What a rank sends after it has read a value proves to whoever receives it that the value had arrived: that send is
    complete, and its memory may go.
    """

    def __init__(self, schedule: Schedule, flow: Dataflow) -> None:
        self.sent: dict[Token, tuple[int, int]] = {}  # (rank, position) of the SEND
        self.read_at: dict[Token, int] = {}  # position of the reader in its rank's row
        for rank, row in enumerate(schedule):
            for position, action in enumerate(row):
                effect = flow.effect(action)
                if action.kind.is_send:
                    self.sent[effect.reads[0]] = (rank, position)
                else:
                    self.read_at.update(dict.fromkeys(effect.reads, position))
