"""Whether stages, a schedule and a mesh go together."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from autofunc.errors import MeshError, ScheduleError
from autofunc.mesh import check_axes, pp_ranks
from autofunc.schedule import Schedule, validate
from autofunc.splitting import Stage, check_whole


def check_compatible(stages: Sequence[Stage], schedule: Schedule, mesh: DeviceMesh | None) -> None:
    """Refuse what cannot be one pipeline.

    Args:
        stages: of one model.
        schedule: in compute form.
        mesh: None for one process.

    Raises:
        ScheduleError: when the schedule is invalid or does not fit the number of stages.
        SplitError: when the stages are not all of one model, in order.
        MeshError: when the mesh has other axes than autofunc knows, or another number of pp ranks than the schedule.
    """
    if len(stages) != schedule.num_stages:
        raise ScheduleError(
            f"schedule {schedule.name} with {schedule.num_ranks} ranks has {schedule.num_stages} stages, but the model "
            f"is split into {len(stages)}; use {schedule.num_stages - 1} split points, or another number of ranks"
        )
    check_whole(stages)
    validate(schedule)
    if mesh is None:
        return
    check_axes(mesh)
    num_ranks = len(pp_ranks(mesh))
    if num_ranks != schedule.num_ranks:
        raise MeshError(
            f"the mesh has {num_ranks} pp ranks, but schedule {schedule.name} was built for "
            f"{schedule.num_ranks}; they must be equal"
        )
