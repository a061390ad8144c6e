"""The ops of a rank's program: one class per kind of action, with exactly the operands it needs.

Operands are numbers: of registers, slots, channels and sends. A register holds either a list of tensors, which crosses
between stages, or residuals, which only the engine that made them understands. Every op that reads a register frees it.
"""

from __future__ import annotations

from typing import NamedTuple


class Forward(NamedTuple):
    """`F`: run a stage on a microbatch."""

    position: int  # in the lowered row
    stage: int
    microbatch: int
    reads: tuple[int, ...]  # registers of its inputs, in the order of the edges that end at the stage
    writes: tuple[int, ...]  # registers of its outputs, one per edge that begins at the stage, each with its own list
    keeps: int | None  # register of the residuals for B or I; None in a run without a backward
    waits: tuple[int, ...]  # those of `reads` with a receive in flight
    settles: tuple[int, ...]  # numbers of the sends that these receives prove complete
    beside: bool = False  # interleaved with the B that comes next


class Backward(NamedTuple):
    """`B`: the full backward of a stage for a microbatch."""

    position: int
    stage: int
    microbatch: int
    residuals: int  # register of F's residuals
    reads: tuple[int, ...]  # registers of the cotangents of its outputs
    writes: tuple[int, ...]  # registers of the cotangents of its inputs
    waits: tuple[int, ...]
    settles: tuple[int, ...]


class BackwardInput(NamedTuple):
    """`I`: the input gradient, the part of the backward that other stages wait for."""

    position: int
    stage: int
    microbatch: int
    residuals: int  # register of F's residuals
    reads: tuple[int, ...]  # registers of the cotangents of its outputs
    writes: tuple[int, ...]  # registers of the cotangents of its inputs
    keeps: int  # register of the residuals for W
    waits: tuple[int, ...]
    settles: tuple[int, ...]


class BackwardWeight(NamedTuple):
    """`W`: the weight gradient, the rest of the backward."""

    position: int
    stage: int
    microbatch: int
    residuals: int  # register of the residuals that `I` kept


class Send(NamedTuple):
    """`SEND_F` or `SEND_B`: post the send of a value."""

    position: int
    stage: int
    microbatch: int
    register: int  # of the value; freed, since the send holds it from now on
    channel: int  # number among the rank's channels
    number: int  # of this send


class Receive(NamedTuple):
    """`RECV_F` or `RECV_B`: post the receive of a value."""

    position: int
    stage: int
    microbatch: int
    register: int  # for the value; its reader waits for it
    channel: int  # number among the rank's channels
    slots: tuple[int, ...]  # that each tensor of the message is written into


class Gather(NamedTuple):
    """`UNSHARD`: start gathering a stage's sharded parameters."""

    position: int
    stage: int


class Release(NamedTuple):
    """`RESHARD`: free a stage's gathered parameters."""

    position: int
    stage: int


class Reduce(NamedTuple):
    """`REDUCE_GRAD`: start summing a stage's gradients over the data parallel ranks."""

    position: int
    stage: int


Op = Forward | Backward | BackwardInput | BackwardWeight | Send | Receive | Gather | Release | Reduce

READERS = (Forward, Backward, BackwardInput)
"""The ops that read received values, and so may have to wait for them."""
