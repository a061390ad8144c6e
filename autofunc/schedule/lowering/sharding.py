"""When sharded parameters are gathered, and when gradients are reduced: placed in a row, and checked.

UNSHARD starts the gathering of a stage's parameters, RESHARD lets them go, REDUCE_GRAD sums the stage's gradients over the
data-parallel ranks. Every computation of a stage needs its parameters; a gradient is reduced after the stage's last
backward and before the parameters go, because its sum is laid out as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import OVERLAPPED, Action, Kind, Schedule
from autofunc.schedule.laws.error_grid import error_at, grid


class Unshard(Enum):
    """How often a stage's sharded parameters are gathered."""

    NEVER = "never"  # they are not sharded
    ONCE = "once"  # before the stage's first computation; they stay until its last
    EACH_USE = "each_use"  # for every computation; less memory, more traffic


def place(
    row: Sequence[Action], unshard: Unshard, ahead: int, reduce: bool = False
) -> tuple[list[list[Action]], list[list[Action]]]:
    """The sharding actions of a rank, to be put before and after each of its computations.

    Args:
        row: computations of the rank.
        unshard: how often to gather.
        ahead: how many computations before its first use a gather starts.
        reduce: whether gradients are reduced where parameters are not sharded.
    """
    before: list[list[Action]] = [[] for _ in row]
    after: list[list[Action]] = [[] for _ in row]
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
    """Positions that run together: an overlapped forward with its backward, everything else alone."""
    turns: list[list[int]] = []
    for position in range(len(row)):
        if position and row[position - 1].peer == OVERLAPPED:
            turns[-1].append(position)
        else:
            turns.append([position])
    return turns


def _uses(row: Sequence[Action], turns: list[list[int]], once: bool) -> list[tuple[int, int, int]]:
    """(stage, first turn, last turn) of each use, in the order of the first; one use per stage if `once`."""
    uses: dict[tuple[int, int], tuple[int, int, int]] = {}
    for number, turn in enumerate(turns):
        for position in turn:
            stage = row[position].stage
            key = (stage, 0 if once else number)
            uses[key] = (stage, uses.get(key, (stage, number))[1], number)
    return list(uses.values())


def check_residency(schedule: Schedule) -> None:
    """Parameters are there whenever they are used, gathered once at a time, and let go of; gradients are reduced once.

    Raises:
        ScheduleError: naming rank, position and action.
    """
    for rank, row in enumerate(schedule):
        if (row.table[:, 1] >= Kind.UNSHARD).any():
            _check_row(schedule, rank, gathers=schedule.is_sharded)


def _check_row(schedule: Schedule, rank: int, gathers: bool) -> None:
    """`gathers` is False where parameters are not sharded and gradients are reduced all the same."""
    resident: dict[int, int] = {}  # stage -> where it was gathered
    reduced: dict[int, int] = {}
    backwards: set[int] = set()
    for position, (stage, kind, _, _) in enumerate(schedule[rank]):
        reason = None
        if kind.is_compute and stage not in resident and gathers:
            reason = f"the parameters of stage {stage} are not gathered; expected {stage}UNSHARD before"
        elif kind.is_backward and stage in reduced:
            reason = f"its gradients were already reduced, at position {reduced[stage]}"
        elif kind is Kind.UNSHARD and stage in resident:
            reason = f"already gathered at position {resident[stage]}; expected {stage}RESHARD in between"
        elif stage not in resident and (kind is Kind.RESHARD or (kind is Kind.REDUCE_GRAD and gathers)):
            reason = f"the parameters of stage {stage} are not gathered"
        elif kind is Kind.REDUCE_GRAD and stage in reduced:
            reason = f"already reduced at position {reduced[stage]}; each stage reduces once"
        if reason is not None:
            raise error_at(schedule, rank, position, reason)
        if kind is Kind.UNSHARD:
            resident[stage] = position
        elif kind is Kind.RESHARD:
            del resident[stage]
        elif kind is Kind.REDUCE_GRAD:
            reduced[stage] = position
        elif kind.is_backward:
            backwards.add(stage)
    for stage, position in sorted(resident.items()):
        raise error_at(schedule, rank, position, f"the parameters are never let go; expected {stage}RESHARD")
    for stage in sorted(backwards - set(reduced)):
        raise ScheduleError(
            f"rank {rank}: the gradients of stage {stage} are never reduced; expected {stage}REDUCE_GRAD after its last "
            f"backward\n{grid(schedule)}"
        )
