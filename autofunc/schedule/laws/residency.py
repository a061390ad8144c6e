"""The laws of sharding actions: parameters are gathered whenever they are used, and gradients reduced once.

UNSHARD starts the gathering of a stage's parameters, RESHARD frees them, REDUCE_GRAD sums the stage's gradients over the
data-parallel ranks. Every computation of a stage needs its parameters; a gradient is reduced after the stage's last
backward and before the parameters are freed, because the sum has their layout.
"""

from __future__ import annotations

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.laws.error_grid import error_at, grid


def check_residency(schedule: Schedule) -> None:
    """Check that parameters are gathered when used, never twice at once, and freed; and that gradients are reduced once.

    Raises:
        ScheduleError: naming rank, position and action.
    """
    for rank, row in enumerate(schedule):
        if (row.table[:, 1] >= Kind.UNSHARD).any():
            _check_row(schedule, rank, gathers=schedule.is_sharded)


def _check_row(schedule: Schedule, rank: int, gathers: bool) -> None:
    """Check one rank; `gathers` is False for parameters that are not sharded, whose gradients are reduced all the same."""
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
        raise error_at(schedule, rank, position, f"the parameters are never freed; expected {stage}RESHARD")
    for stage in sorted(backwards - set(reduced)):
        raise ScheduleError(
            f"rank {rank}: the gradients of stage {stage} are never reduced; expected {stage}REDUCE_GRAD after its last "
            f"backward\n{grid(schedule)}"
        )
