"""Write a row as a script: phases of passes, each repeated; microbatch numbers follow.

Constructions with two stages per rank are published as such scripts ("three times F0 F1, then ..."); here they read the
same, and a row costs a few numpy calls, whatever the number of its actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autofunc.schedule.ir import OVERLAPPED, Kind, Table, frozen


class Pass(NamedTuple):
    """The next action of a kind at a stage: its microbatch follows from the passes before it.

    F counts separately; B and `I` count together, as a stage's backwards; a W finishes the `I` of its stage that has waited
    longest, or, at stage `WAITING`, that of the whole rank.
    """

    stage: int
    kind: Kind
    peer: int = -1  # `OVERLAPPED`: an F that overlaps with the backward after it

    def overlapped(self) -> Pass:
        """Return the same pass, overlapped with the backward after it."""
        return self._replace(peer=OVERLAPPED)


WAITING = -1
"""Takes the place of a W's stage: the W finishes whichever `I` of the rank has waited longest. Used by all W of
a script, or by none."""

Phase = tuple[Sequence[Pass], int]
"""Passes in order, and how many times to run them."""


def passes_of(stage: int) -> tuple[Pass, Pass, Pass, Pass]:
    """Return F, B, `I` and W of a stage."""
    return Pass(stage, Kind.F), Pass(stage, Kind.B), Pass(stage, Kind.I), Pass(stage, Kind.W)


def scripted(phases: Sequence[Phase], num_microbatches: int) -> Table:
    """Expand a script into a row: int32 of shape (actions, 4).

    Args:
        phases: in order.
        num_microbatches: actions of later microbatches are dropped.
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
