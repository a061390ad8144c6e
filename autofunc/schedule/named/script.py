"""Write a row as a script: each line says what to run next, and microbatches count themselves.

Constructions with two stages per rank are published as such scripts ("three times F0 F1, then ..."); here they look the
same. `down` is a rank's stage on the way down the V, `up` the one on the way up.
"""

from __future__ import annotations

from collections import deque

from autofunc.schedule.ir import OVERLAPPED, Action, Kind, Table, as_table


class Script:
    """Actions of one rank of a V, in the order in which they are asked for."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.down, self.up = rank, 2 * num_ranks - 1 - rank
        self.actions: list[Action] = []
        self._next: dict[tuple[int, Kind], int] = {}
        self._weights: deque[Action] = deque()

    def forward(self, stage: int, *, overlapped: bool = False) -> None:
        """The next forward of a stage; `overlapped` with the backward that follows."""
        self.actions.append(Action(stage, Kind.F, self._count(stage, Kind.F), OVERLAPPED if overlapped else -1))

    def backward(self, stage: int) -> None:
        """The next full backward of a stage."""
        self.actions.append(Action(stage, Kind.B, self._count(stage, Kind.I)))

    def backward_input(self, stage: int) -> None:
        """The next input gradient of a stage; its weight gradient waits."""
        microbatch = self._count(stage, Kind.I)
        self.actions.append(Action(stage, Kind.I, microbatch))
        self._weights.append(Action(stage, Kind.W, microbatch))

    def backward_weight(self, stage: int | None = None) -> None:
        """The weight gradient that has waited longest, of a stage or of both; nothing when none waits."""
        for action in self._weights:
            if stage in (None, action.stage):
                self._weights.remove(action)
                self.actions.append(action)
                return

    def count(self, stage: int) -> int:
        """How many forwards of a stage have been asked for."""
        return self._next.get((stage, Kind.F), 0)

    def table(self, num_microbatches: int) -> Table:
        """The actions of the microbatches there are; constructions for more leave the others out."""
        return as_table(action for action in self.actions if action.microbatch < num_microbatches)

    def _count(self, stage: int, kind: Kind) -> int:
        microbatch = self._next.get((stage, kind), 0)
        self._next[stage, kind] = microbatch + 1
        return microbatch
