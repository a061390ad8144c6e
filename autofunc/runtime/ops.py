"""The ops of a rank's program: one kind for each kind of action, with what it needs and nothing else.

Operands are numbers: of registers, slots, channels and sends. A register holds either a list of tensors, which crosses
between stages, or residuals, which only the engine that made them understands. Every op that reads a register frees it.
"""

from __future__ import annotations

from typing import NamedTuple


class Forward(NamedTuple):
    """F: run a stage on a microbatch."""

    position: int  # in the lowered row
    stage: int
    microbatch: int
    reads: tuple[int, ...]  # registers of what it is given, in the order of the edges that end at the stage
    writes: tuple[int, ...]  # registers of what it makes, one for each edge that begins there; each gets a list of its own
    keeps: int | None  # register of the residuals for B or I; None in a run without a backward
    waits: tuple[int, ...]  # those of `reads` in which a receive is in flight
    settles: tuple[int, ...]  # sends that what is waited for proves complete, by number
    beside: bool = False  # whether it runs side by side with the B that comes next


class Backward(NamedTuple):
    """B: the full backward of a stage for a microbatch."""

    position: int
    stage: int
    microbatch: int
    residuals: int  # register of what F kept
    reads: tuple[int, ...]  # registers of the cotangents of its outputs
    writes: tuple[int, ...]  # registers of the cotangents of its inputs
    waits: tuple[int, ...]
    settles: tuple[int, ...]


class BackwardInput(NamedTuple):
    """I: the part of the backward that others wait for."""

    position: int
    stage: int
    microbatch: int
    residuals: int  # register of what F kept
    reads: tuple[int, ...]  # registers of the cotangents of its outputs
    writes: tuple[int, ...]  # registers of the cotangents of its inputs
    keeps: int  # register of the residuals for W
    waits: tuple[int, ...]
    settles: tuple[int, ...]


class BackwardWeight(NamedTuple):
    """W: the rest of the backward."""

    position: int
    stage: int
    microbatch: int
    residuals: int  # register of what I kept


class Send(NamedTuple):
    """SEND_F or SEND_B: post the sending of a value."""

    position: int
    stage: int
    microbatch: int
    register: int  # of the value, freed: the send holds it from now on
    channel: int  # number among the rank's channels
    number: int  # of this send


class Receive(NamedTuple):
    """RECV_F or RECV_B: post the receiving of a value."""

    position: int
    stage: int
    microbatch: int
    register: int  # in which the value will be; whoever reads it waits for it
    channel: int  # number among the rank's channels
    slots: tuple[int, ...]  # what each tensor of the message is written into


class Gather(NamedTuple):
    """UNSHARD: start to gather a stage's sharded parameters."""

    position: int
    stage: int


class Release(NamedTuple):
    """RESHARD: let go of a stage's gathered parameters."""

    position: int
    stage: int


class Reduce(NamedTuple):
    """REDUCE_GRAD: start to sum a stage's gradients over the data parallel ranks."""

    position: int
    stage: int


Op = Forward | Backward | BackwardInput | BackwardWeight | Send | Receive | Gather | Release | Reduce

READERS = (Forward, Backward, BackwardInput)
"""The ops that read what was received, and so may have to wait for it."""
