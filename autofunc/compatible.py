"""Check that stages, a schedule and a mesh fit together."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from autofunc.errors import MeshError, ModelError, ScheduleError
from autofunc.mesh import axis_size, check_axes, pp_ranks
from autofunc.model import Model
from autofunc.schedule import Schedule, validate
from autofunc.splitting import Stage, check_whole


def check_compatible(stages: Sequence[Stage], schedule: Schedule, mesh: DeviceMesh | None) -> None:
    """Refuse stages, a schedule and a mesh that cannot form a pipeline.

    Args:
        stages: of one model.
        schedule: in compute form.
        mesh: None for one process.

    Raises:
        ScheduleError: if the schedule is invalid, has a different number of stages, or reorders the forwards of a stage
            while layers keep state.
        SplitError: if the stages are not all stages of one model, in order.
        ModelError: if layers keep state and tensor parallel ranks would cut them.
        MeshError: if the mesh has an unknown axis, or another number of pp ranks than the schedule.
    """
    if len(stages) != schedule.num_stages:
        raise ScheduleError(
            f"schedule {schedule.name} with {schedule.num_ranks} ranks has {schedule.num_stages} stages, but the model "
            f"is split into {len(stages)}; use {schedule.num_stages - 1} split points, or another number of ranks"
        )
    check_whole(stages)
    validate(schedule)
    if stages[0].model.state_spec:
        _check_keeps_state(stages[0].model, schedule, mesh)
    if mesh is None:
        return
    check_axes(mesh)
    num_ranks = len(pp_ranks(mesh))
    if num_ranks != schedule.num_ranks:
        raise MeshError(
            f"the mesh has {num_ranks} pp ranks, but schedule {schedule.name} was built for "
            f"{schedule.num_ranks}; they must be equal"
        )


def _check_keeps_state(model: Model, schedule: Schedule, mesh: DeviceMesh | None) -> None:
    path = next(iter(model.state_spec))
    if not schedule.forwards_in_order:
        raise ScheduleError(
            f"schedule {schedule.name} does not run a stage's forwards in microbatch order, but "
            f"{model.title} keeps state ({path}, ...) between them; all named schedules run forwards in order"
        )
    if axis_size(mesh, "tp") > 1:
        raise ModelError(
            f"{model.title} keeps state ({path}, ...), but its layers would be cut over {axis_size(mesh, 'tp')} tp ranks; "
            "use tp=1, or layers without state"
        )
