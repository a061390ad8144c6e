"""Write a row as a script: phases of passes, each repeated; microbatches count themselves.

Constructions with two stages per rank are published as such scripts ("three times F0 F1, then ..."); here they look the
same, and a row costs a few numpy calls, whatever the number of its actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autofunc.schedule.ir import OVERLAPPED, Kind, Table, frozen


class Pass(NamedTuple):
    """The next action of a kind at a stage: its microbatch follows from the passes before it.

    F counts by itself; B and I count together, as a stage's backwards; a W finishes the I of its stage that has waited
    longest, or, at stage `WAITING`, that of the whole rank.
    """

    stage: int
    kind: Kind
    peer: int = -1  # `OVERLAPPED`: an F beside the backward that follows

    def overlapped(self) -> Pass:
        """The same beside the backward that follows."""
        return self._replace(peer=OVERLAPPED)


WAITING = -1
"""In place of the stage of a W: wherever the I is that has waited longest. Then every W of a script is such a one."""

Phase = tuple[Sequence[Pass], int]
"""Passes, and how many times they run one after the other."""


def passes_of(stage: int) -> tuple[Pass, Pass, Pass, Pass]:
    """F, B, I and W of a stage."""
    return Pass(stage, Kind.F), Pass(stage, Kind.B), Pass(stage, Kind.I), Pass(stage, Kind.W)


def scripted(phases: Sequence[Phase], num_microbatches: int) -> Table:
    """The row of a script: int32 of shape (actions, 4).

    Args:
        phases: one after the other.
        num_microbatches: those there are; constructions for more leave the others out.
    """
    passes = np.concatenate([np.tile(np.array(each, np.int32).reshape(-1, 3), (times, 1)) for each, times in phases])
    stage, kind, peer = np.ascontiguousarray(passes.T)
    inputs, weights = np.flatnonzero(kind == Kind.I), np.flatnonzero(kind == Kind.W)
    if WAITING in stage[weights[:1]]:
        stage[weights] = stage[inputs]
    microbatch = np.empty_like(stage)
    for each in np.unique(stage):
        here = stage == each
        for counted in (here & (kind == Kind.F), here & ((kind == Kind.B) | (kind == Kind.I))):
            microbatch[counted] = np.arange(np.count_nonzero(counted))
        microbatch[weights[here[weights]]] = microbatch[inputs[here[inputs]]]
    table = np.stack((stage, kind, microbatch, peer), axis=-1)
    return frozen(table[microbatch < num_microbatches])
