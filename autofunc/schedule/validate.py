"""The laws of schedules, checked."""

from __future__ import annotations

from collections.abc import Sequence

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Dataflow, Edge, chain
from autofunc.schedule.grid import grid
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.walk import walk


def validate(schedule: Schedule, edges: Sequence[Edge] | None = None) -> None:
    """Check a schedule, in compute form or lowered.

    Every (stage, microbatch) runs F once and either B once or I and W once, on the rank its stage is placed on and in
    dependency order; a forward-only schedule runs each F once. In lowered form every send meets a receive, in the same
    order on both ends of every edge, without deadlock even when nothing is buffered, and nothing is live at the end.

    Args:
        schedule: what to check.
        edges: connections between stages; a chain by default.

    Raises:
        ScheduleError: naming rank, position and action, with the grid and the action marked.
    """
    _check_counts(schedule)
    for _ in walk(schedule, Dataflow(chain(schedule.num_stages) if edges is None else edges, schedule.is_forward_only)):
        pass


def _check_counts(schedule: Schedule) -> None:
    seen: dict[tuple[int, Kind, int], tuple[int, int]] = {}
    for rank, row in enumerate(schedule):
        for position, action in enumerate(row):
            where = f"rank {rank}, position {position}, {action}"
            if not 0 <= action.stage < schedule.num_stages:
                raise _error(schedule, rank, position, f"{where}: there are stages 0 to {schedule.num_stages - 1}")
            if not 0 <= action.microbatch < schedule.num_microbatches:
                last = schedule.num_microbatches - 1
                raise _error(schedule, rank, position, f"{where}: there are microbatches 0 to {last}")
            if schedule.placement[action.stage] != rank:
                home = schedule.placement[action.stage]
                raise _error(schedule, rank, position, f"{where}: stage {action.stage} is placed on rank {home}")
            if not action.kind.is_compute:
                continue
            key = (action.stage, action.kind, action.microbatch)
            if key in seen:
                raise _error(
                    schedule, rank, position, f"{where}: it ran before, at position {seen[key][1]}; each runs exactly once"
                )
            seen[key] = (rank, position)

    for stage, rank in enumerate(schedule.placement):
        for microbatch in range(schedule.num_microbatches):
            has = {kind for kind in Kind if (stage, kind, microbatch) in seen}
            if has not in _COMPLETE and not (schedule.is_forward_only and has == {Kind.F}):
                found = ", ".join(f"{stage}{kind.name}{microbatch}" for kind in sorted(has)) or "nothing"
                raise ScheduleError(
                    f"stage {stage}, microbatch {microbatch} on rank {rank}: found {found}; expected F once, and B once or "
                    f"I and W once\n{grid(schedule)}"
                )


_COMPLETE = ({Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W})


def _error(schedule: Schedule, rank: int, position: int, message: str) -> ScheduleError:
    return ScheduleError(f"{message}\n{grid(schedule, (rank, position))}")
