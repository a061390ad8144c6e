"""Where in a row sharded parameters are gathered and freed, and where gradients are reduced.

The laws of these actions are in `laws/residency.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from autofunc.schedule.ir import OVERLAPPED, Action, Kind
from autofunc.schedule.lowering.gaps import Gaps


class Unshard(Enum):
    """How often a stage's sharded parameters are gathered."""

    NEVER = "never"  # they are not sharded
    ONCE = "once"  # before the stage's first computation; they stay until its last
    EACH_USE = "each_use"  # for every computation; less memory, more traffic


def sharding_actions(row: Sequence[Action], unshard: Unshard, ahead: int, reduce: bool = False) -> tuple[Gaps, Gaps]:
    """Place the sharding actions of a rank before and after each of its computations.

    Args:
        row: computations of the rank.
        unshard: how often to gather.
        ahead: how many computations before its first use a gather starts.
        reduce: reduce gradients even if parameters are not sharded.
    """
    before: Gaps = [[] for _ in row]
    after: Gaps = [[] for _ in row]
    turns = _turns(row)
    last_backward = {action.stage: position for position, action in enumerate(row) if action.kind.is_backward}
    if unshard is Unshard.NEVER:
        for turn in turns if reduce else []:
            for stage in sorted({row[position].stage for position in turn}):
                if last_backward.get(stage, -1) in turn:
                    after[turn[-1]].append(Action(stage, Kind.REDUCE_GRAD, -1))
        return before, after
    free_from: dict[int, int] = {}  # by stage: the turn from which it may be gathered again
    for stage, first, last in _uses(row, turns, once=unshard is Unshard.ONCE):
        gather_at = turns[max(first - ahead, free_from.get(stage, 0))][0]
        release_at = turns[last][-1]
        before[gather_at].append(Action(stage, Kind.UNSHARD, -1))
        if last_backward.get(stage, -1) in turns[last]:
            after[release_at].append(Action(stage, Kind.REDUCE_GRAD, -1))
        after[release_at].append(Action(stage, Kind.RESHARD, -1))
        free_from[stage] = last + 1
    return before, after


def _turns(row: Sequence[Action]) -> list[list[int]]:
    """Group positions that run together: an overlapped forward with its backward, everything else alone."""
    turns: list[list[int]] = []
    for position in range(len(row)):
        if position and row[position - 1].peer == OVERLAPPED:
            turns[-1].append(position)
        else:
            turns.append([position])
    return turns


def _uses(row: Sequence[Action], turns: list[list[int]], once: bool) -> list[tuple[int, int, int]]:
    """List (stage, first turn, last turn) of each use, in order of the first; one use per stage if `once`."""
    uses: dict[tuple[int, int], tuple[int, int, int]] = {}
    for number, turn in enumerate(turns):
        for position in turn:
            stage = row[position].stage
            key = (stage, 0 if once else number)
            uses[key] = (stage, uses.get(key, (stage, number))[1], number)
    return list(uses.values())
