"""How a configuration lays out a model: its stages, and the schedule that runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from autofunc.config import FinetuneConfig, call, resolve_target
from autofunc.data import first_rows
from autofunc.errors import AutofuncError, ConfigError, ScheduleError
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.schedule import Schedule, build, default_stages_per_rank, is_looped, is_named
from autofunc.splitting import Stage, split

Points = list[str] | int | Literal["auto"] | None
LayerCosts = Callable[[Model, Mapping[str, Any], Loss | None], Mapping[str, float]]
"""From a model, an example microbatch and the loss to each layer's cost, by name. The unit does not matter, because stages
are balanced by ratios. `splitting.layer_costs`, which counts operations, is one."""

Cut = Callable[[int], list[Stage]]
"""From the number of stages that a schedule needs to the stages; split points may give a different number."""


def is_auto(config: FinetuneConfig) -> bool:
    """Return whether to search for the schedule."""
    return config.distributed.schedule.lower() == "auto"


def stages_and_schedule(
    config: FinetuneConfig,
    num_microbatches: int,
    model: Model,
    loss: Loss | None,
    dataset: Any,
    notes: list[str],
    layer_costs: LayerCosts,
) -> tuple[list[Stage], Schedule]:
    """Return the stages that split_points give, and their schedule; for `auto`, the schedule to measure costs with.

    Args:
        config: the configuration.
        num_microbatches: per data parallel rank.
        model: to split.
        loss: part of the last layer's cost.
        dataset: its rows are used to count costs.
        notes: gains a line for each departure from the configuration.
        layer_costs: balances stages if split points are not given by name.

    Raises:
        ConfigError: if stages and schedule do not fit.
    """
    name, num_ranks, points = config.distributed.schedule, config.distributed.pp_size, config.distributed.split_points
    microbatch = first_rows(dataset, config.step_scheduler.local_batch_size)
    cut = partial(_split, model, points, lambda model: layer_costs(model, microbatch, loss))
    if is_auto(config):
        return _to_measure(num_ranks, num_microbatches, cut, points, notes)
    if not is_named(name) or "." in name:
        return _own(name, num_ranks, num_microbatches, cut, points)
    try:
        per_rank = default_stages_per_rank(name)
    except ScheduleError as error:
        raise ConfigError(f"distributed.schedule: {error}; or auto, which searches for a schedule") from error
    stages = cut(num_ranks * per_rank)
    if num_ranks == 1 and per_rank == 1 and len(stages) > 1:
        notes.append("pp_size is 1, so the model is one stage and split_points are not used")
        stages = split(model, 1)
    smallest = num_ranks * per_rank
    if len(stages) % num_ranks or len(stages) < smallest or (len(stages) > smallest and not is_looped(name)):
        multiple = " (or a larger multiple)" if is_looped(name) else ""
        raise ConfigError(
            f"distributed: pp_size={num_ranks} with schedule {name} needs {smallest} stages{multiple}, but "
            f"split_points={points} gives {len(stages)}; give {smallest - 1} split points, or set pp_size: "
            f"{max(len(stages) // per_rank, 1)}"
        )
    return stages, _named(name, num_ranks, num_microbatches, len(stages) // num_ranks)


def _to_measure(
    num_ranks: int, num_microbatches: int, cut: Cut, points: Points, notes: list[str]
) -> tuple[list[Stage], Schedule]:
    """Return the stages for `auto`, and the simplest schedule that runs them."""
    stages = cut(num_ranks)
    per_rank, left = divmod(len(stages), num_ranks)
    if left:
        near = " or ".join(str(number * num_ranks) for number in (per_rank, per_rank + 1) if number)
        raise ConfigError(
            f"distributed: pp_size={num_ranks} with schedule auto needs a multiple of {num_ranks} stages, such as {near}, "
            f"but split_points={points} gives {len(stages)}"
        )
    name = "1f1b" if per_rank == 1 else "interleaved_1f1b"
    if num_ranks == 1:
        notes.append(f"pp_size is 1, so schedule auto has nothing to search for and uses {name}")
    return stages, _named(name, num_ranks, num_microbatches, per_rank)


def _own(name: str, num_ranks: int, num_microbatches: int, cut: Cut, points: Points) -> tuple[list[Stage], Schedule]:
    """Return a table's or user function's schedule, and the stages it needs."""
    source = resolve_target(name, "distributed.schedule") if is_named(name) else name
    make = partial(build, source, num_ranks=num_ranks, num_microbatches=num_microbatches)
    schedule: Schedule = call(make, "distributed.schedule", name)
    stages = cut(schedule.num_stages)
    if len(stages) != schedule.num_stages:
        raise ConfigError(
            f"distributed: schedule {name} has {schedule.num_stages} stages, but split_points={points} gives "
            f"{len(stages)}; give {schedule.num_stages - 1} split points"
        )
    return stages, schedule


def _named(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    try:
        return build(name, num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank)
    except ScheduleError as error:
        raise ConfigError(f"distributed.schedule: {error}") from error


def _split(model: Model, points: Points, costs: Callable[[Model], Mapping[str, float]], default: int) -> list[Stage]:
    """Split at `points`, or by balanced costs if they are a number or absent."""
    try:
        if isinstance(points, list):
            return split(model, points)
        number = points if isinstance(points, int) else default
        if number == 1:
            return split(model)
        if number > len(model.layers):
            model = model.cut_before(list(model.specialise().cut_points.start))
        return split(model, number, costs=costs(model))
    except AutofuncError as error:
        raise ConfigError(f"distributed.split_points: {error}") from error


MOST_MICROBATCHES = 1 << 13
"""Per data parallel rank and step: a schedule holds an entry for each."""


def count_microbatches(config: FinetuneConfig, dp: int) -> int:
    """Return the number of microbatches per data parallel rank.

    Raises:
        ConfigError: if rows do not divide evenly, or make too many microbatches.
    """
    rows, per_microbatch = config.step_scheduler.global_batch_size, config.step_scheduler.local_batch_size
    if rows % (per_microbatch * dp):
        shared = f" times {dp} data parallel ranks" if dp > 1 else ""
        if rows % dp:
            raise ConfigError(
                f"step_scheduler: global_batch_size={rows} cannot be shared by {dp} data parallel ranks; the nearest that "
                f"can is {max(round(rows / dp), 1) * dp}"
            )
        raise ConfigError(
            f"step_scheduler: global_batch_size={rows} is not divisible by local_batch_size={per_microbatch} (the rows of "
            f"one microbatch){shared}; the nearest that divides it is {_nearest_divisor(rows // dp, per_microbatch)}"
        )
    number = rows // (per_microbatch * dp)
    if number > MOST_MICROBATCHES:
        raise ConfigError(
            f"step_scheduler: global_batch_size={rows} with local_batch_size={per_microbatch} and {dp} data parallel "
            f"rank{'s' * (dp > 1)} makes {number:,} microbatches per step; the maximum is {MOST_MICROBATCHES:,}; use "
            "larger microbatches, or a smaller batch"
        )
    return number


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return min([*divisors, *(number // size for size in reversed(divisors))], key=lambda size: abs(size - wanted))
