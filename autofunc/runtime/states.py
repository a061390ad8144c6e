"""The state that layers keep between microbatches, at the start and end of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc.mesh import DATA_AXES, data_coordinate, sum_over
from autofunc.splitting import Stage

States = Mapping[tuple[int, int], Sequence[Tensor]]
"""State by (stage, lane), see `executor.RankStep.states`."""


def states_of(stages: Sequence[Stage], lanes: Sequence[Mapping[str, Tensor]]) -> dict[tuple[int, int], Sequence[Tensor]]:
    """Return state by stage and lane, from a flat tree per lane."""
    return {
        (stage.index, lane): [flat[path] for path in stage.states] for lane, flat in enumerate(lanes) for stage in stages
    }


def flat_lanes(stages: Sequence[Stage], states: States, num_lanes: int) -> list[dict[str, Tensor]]:
    """Return the new state of stages as a flat tree per lane."""
    return [
        {path: leaf for stage in stages for path, leaf in zip(stage.states, states[stage.index, lane], strict=True)}
        for lane in range(num_lanes)
    ]


def flat_states(stages: Sequence[Stage], states: States, mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Return the new state of stages as a flat tree; all data parallel ranks get that of the first of them."""
    (flat,) = flat_lanes(stages, states, 1)
    place, size = data_coordinate(mesh)
    if size == 1 or not flat:
        return flat
    groups: dict[torch.dtype, list[str]] = {}
    for path, leaf in flat.items():
        groups.setdefault(leaf.dtype, []).append(path)
    for dtype, paths in groups.items():
        travels = torch.uint8 if dtype is torch.bool else dtype
        together = torch.cat([flat[path].to(travels).reshape(-1) for path in paths])
        # a sum with zeros is exact, and every backend supports it for every dtype
        shared = sum_over(mesh, DATA_AXES, together if place == 0 else torch.zeros_like(together))
        parts = torch.split(shared, [flat[path].numel() for path in paths])
        flat.update({path: part.view(flat[path].shape).to(dtype) for path, part in zip(paths, parts, strict=True)})
    return flat
