"""A pipeline in words and a picture."""

from __future__ import annotations

from collections.abc import Sequence

from autofunc.model import Model
from autofunc.schedule import Schedule, draw, simulate
from autofunc.shown import shown
from autofunc.splitting import Boundaries, Stage, parameter_count


def explain(stages: Sequence[Stage], schedule: Schedule, boundaries: Boundaries | None = None, colour: bool = False) -> str:
    """Describe stages with their ranks, layers and parameters, the values that cross, the origin of weights, the schedule.

    Args:
        stages: all stages.
        schedule: in compute form.
        boundaries: values between stages, once a batch has been seen.
        colour: paint the picture with ANSI colours.
    """
    model = stages[0].model
    lines = []
    for stage in stages:
        first, last = shown(stage.layers[0]), shown(stage.layers[-1])
        layers = first if len(stage.layers) == 1 else f"{first} .. {last}"
        count = parameter_count(model, list(stage.holders))
        lines.append(f"stage {stage.index} on rank {schedule.placement[stage.index]}: {layers}, {count:,} parameters")
        if boundaries is not None and stage is not stages[-1]:
            for value in boundaries.stages[stage.index].values:
                shape = "x".join(map(str, value.shape)) or "scalar"
                dtype = str(value.dtype).removeprefix("torch.")
                back = "" if value.needs_grad else ", forward only"
                lines.append(f"  -> {shown(value.name)}: {dtype} {shape}, {value.num_bytes:,} bytes a microbatch{back}")
    crossing = [
        (alias, canonical)
        for alias, canonical in model.ties.items()
        if _stage_of(stages, alias) is not _stage_of(stages, canonical)
    ]
    lines += [f"tied across stages: {shown(alias)} is {shown(canonical)}" for alias, canonical in crossing]
    lines.append(f"initial weights: {_origin(model)}")
    bubble = simulate(schedule).bubble_fraction
    lines.append(
        f"schedule {shown(schedule.name)}: {schedule.num_ranks} rank{'s' * (schedule.num_ranks > 1)}, "
        f"{schedule.num_microbatches} microbatch{'es' * (schedule.num_microbatches > 1)}, bubble {bubble:.1%}"
    )
    return "\n".join([*lines, draw(schedule, colour=colour)])


def _origin(model: Model) -> str:
    """Describe where `init` takes values from."""
    own = {path: model.has_own_value(path) for path in map(model.canonical, model.spec)}
    seeded = [path for path, has_value in own.items() if not has_value]
    if len(seeded) == len(own):
        return "made from the seed"
    others = f", but for {len(seeded)} parameters that are made from the seed" if seeded else ", whatever the seed"
    return f"{shown(model.title)}'s own{others}"


def _stage_of(stages: Sequence[Stage], path: str) -> Stage:
    return next(stage for stage in stages if stage.model.layer_of(path) in stage.layers)
