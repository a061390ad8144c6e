"""A dry run: stages, memory, traffic and step time, computed without processes or weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from autofunc import tree
from autofunc.config import FinetuneConfig, refusing_exit
from autofunc.errors import AutofuncError
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.schedule import Costs, StageBytes, Timeline, lower, peak_bytes, simulate
from autofunc.shard.cut_over_tp import cut_over_tp
from autofunc.splitting import (
    Boundaries,
    LayerCost,
    Stage,
    count_operations,
    imbalance,
    infer_boundaries,
    measure_layer,
    measure_layers,
    parameter_count,
)
from autofunc.spreading import AxisPlan
from autofunc.timing import clock
from autofunc.train.axes import setting_alone
from autofunc.train.connections import count_connections, most_bytes
from autofunc.train.device import on_gpus
from autofunc.train.memory_budget import kept_bytes, kept_over_tp, pipe_alone
from autofunc.train.model import SEED
from autofunc.train.recipe import Recipe, prepare
from autofunc.train.tensor_parallel_check import check_tensor_parallel
from autofunc.train.threads import threads

_LONGEST_TIMED_MS = 2_000.0  # limit for a layer that is timed to scale the others


@dataclass(frozen=True)
class StagePlan:
    """One stage; figures per microbatch."""

    stage: int
    rank: int
    first_layer: str
    last_layer: str
    parameters: int
    forward_flops: int
    forward_ms: float
    backward_ms: float
    sends_bytes: int  # to the next stage; gradients of the same size come back where needed


@dataclass(frozen=True)
class RankPlan:
    """One pp rank, at one coordinate of the other axes."""

    rank: int
    parameter_bytes: int
    gathered_bytes: int  # copies of parameters that a step computes with: of whole layers, in its precision
    optimizer_bytes: int
    activation_bytes: int | None  # most bytes alive, including gradient sums; None: only the rank itself can tell
    connections: int  # to and from other pp ranks, each one way
    connection_bytes: int | None  # upper bound of what they take on a GPU; None on CPU


@dataclass(frozen=True)
class RunPlan:
    """A dry run."""

    recipe: Recipe
    stages: tuple[StagePlan, ...]
    ranks: tuple[RankPlan, ...]
    timeline: Timeline  # predicted, in ms
    measured: bool  # whether times come from layers that ran here, or from counted operations
    timed: str | None  # the layer that ran here, whose time scales the counted operations; None: none
    why_not: str  # why no layer was timed
    imbalance: float  # the longest stage over the mean
    over: AxisPlan | None  # how tp ranks share a captured module

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        return {
            "processes": self.recipe.axes.num_processes,
            "schedule": self.recipe.schedule.name,
            "microbatches": self.recipe.schedule.num_microbatches,
            "step_time_ms": self.timeline.makespan,
            "bubble_fraction": self.timeline.bubble_fraction,
            "imbalance": self.imbalance,
            "times_are": "measured" if self.measured else "counted",
            "timed_layer": self.timed,
            "split_points": [stage.first_layer for stage in self.stages[1:]],
            "stages": [asdict(stage) for stage in self.stages],
            "ranks": [asdict(rank) for rank in self.ranks],
            "notes": list(self.recipe.notes),
            "tensor_parallel": {
                name: {"dim": cut.dim, "parts": list(cut.parts)}
                for name, cut in (self.over.cuts if self.over is not None else {}).items()
            },
        }


@refusing_exit()
def plan_run(
    config: FinetuneConfig,
    num_processes: int | None,
    notes: Sequence[str],
    *,
    measure: bool,
    on_progress: Callable[[str], None],
) -> RunPlan:
    """Compute what a run will do.

    Args:
        config: the configuration.
        num_processes: see `prepare`.
        notes: see `prepare`.
        measure: time every layer on this machine with real weights, and balance stages by the times.
        on_progress: called with the current activity.

    Raises:
        AutofuncError: for every mistake in the configuration.
    """
    times: dict[str, tuple[float, float]] = {}
    timed, why_not = None, ""

    def measured(model: Model, microbatch: Mapping[str, Any], loss: Loss | None) -> dict[str, float]:
        params = model.init(config.seed if model.uses_seed else None)
        times.update(
            measure_layers(model, params, microbatch, loss, on_progress=lambda name: on_progress(f"measured {name}"))
        )
        return {name: forward + backward for name, (forward, backward) in times.items()}

    with threads(config.distributed.threads_per_rank):
        on_progress("reading the model and the data")
        options: dict[str, Any] = {"layer_costs": measured} if measure else {}
        recipe = prepare(config if measure else _without_weights(config), num_processes, notes=notes, **options)
        over_ranks = check_tensor_parallel(recipe)
        microbatch = recipe.microbatch((recipe.seed, 1))
        if measure and not times:  # split points are given
            measured(recipe.model, microbatch, recipe.loss)
        on_progress("counting operations")
        counted = count_operations(recipe.model, microbatch, recipe.loss)
        clock.done("counting operations")
        if not measure:
            on_progress("timing a layer")
            times, timed, why_not = _times_of(recipe, microbatch, counted)
            clock.done("timing a layer")
        on_progress("inferring the boundaries")
        setting = setting_alone(recipe.axes, recipe.sharding)
        boundaries = over_ranks.boundaries or infer_boundaries(recipe.stages, {}, microbatch, recipe.loss, setting=setting)
        stages = tuple(_stages(recipe, boundaries, {name: each.flops for name, each in counted.items()}, times))
        on_progress("capturing the stages")
        uneven = imbalance(recipe.stages, {name: sum(pair) for name, pair in times.items()})
        timeline = simulate(recipe.schedule, _costs(stages))
        ranks = tuple(_ranks(recipe, count_connections(recipe, boundaries), on_gpus(config.distributed.device)))
        return RunPlan(recipe, stages, ranks, timeline, measure, timed, why_not, uneven, over_ranks.over)


def _stages(
    recipe: Recipe,
    boundaries: Boundaries,
    flops: Mapping[str, int],
    times: Mapping[str, tuple[float, float]],
) -> Iterator[StagePlan]:
    """Return all stages, from each layer's operations and its forward and backward milliseconds.

    The cp and tp ranks are assumed to share them evenly.
    """
    shared_by = recipe.axes.cp * recipe.axes.tp
    for stage in recipe.stages:
        yield StagePlan(
            stage.index,
            recipe.schedule.placement[stage.index],
            stage.layers[0],
            stage.layers[-1],
            parameter_count(recipe.model, list(stage.holders)),
            sum(flops[name] for name in stage.layers) // shared_by,
            sum(times[name][0] for name in stage.layers) / shared_by,
            sum(times[name][1] for name in stage.layers) / shared_by,
            boundaries.stages[stage.index].num_bytes if stage is not recipe.stages[-1] else 0,
        )


def _costs(stages: Sequence[StagePlan]) -> Costs:
    """Return costs in ms. The first stage needs no input gradient: its whole backward is W."""
    forward, backward = [stage.forward_ms for stage in stages], [stage.backward_ms for stage in stages]
    inputs = [0.0, *(each / 2 for each in backward[1:])]
    return Costs(forward, inputs, [whole - part for whole, part in zip(backward, inputs, strict=True)], 0.0)


def _times_of(
    recipe: Recipe, microbatch: Mapping[str, Any], counted: Mapping[str, LayerCost]
) -> tuple[dict[str, tuple[float, float]], str | None, str]:
    """Return all layers' milliseconds from their operations, the layer timed to scale them, or why there is none.

    Small operators wait for memory and for Python, so the rate of a large matrix product is several times too high for
    them: timing the costliest layer corrects it.
    """
    rate = flops_per_ms()
    times = {name: (each.forward / rate, each.backward / rate) for name, each in counted.items()}
    name = max(times, key=lambda name: sum(times[name]))
    if sum(times[name]) > _LONGEST_TIMED_MS:
        return times, None, f"{name} would take longer than {_LONGEST_TIMED_MS / 1e3:g} s"
    try:
        took = measure_layer(recipe.model, name, microbatch, recipe.loss)
    except Exception as error:  # from the user's layer, on values it would never get
        return times, None, f"{name} does not run alone: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    forward, backward = (real / guess if guess else 1.0 for real, guess in zip(took, times[name], strict=True))
    return {layer: (each[0] * forward, each[1] * backward) for layer, each in times.items()}, name, ""


def flops_per_ms() -> float:
    """Measure this process's floating-point operations per millisecond, in a matrix product."""
    a = torch.randn(512, 512)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / (best * 1e3)


def _without_weights(config: FinetuneConfig) -> FinetuneConfig:
    """Return the configuration without real weights: nothing is trained."""
    return config if config.weights is not None else config.model_copy(update={"weights": SEED})


def _ranks(recipe: Recipe, connections: Sequence[int], uses_nccl: bool) -> list[RankPlan]:
    kept = _kept(recipe)
    lowered = lower(recipe.schedule, sends_block=recipe.transfers.sends_block)
    peaks = peak_bytes(lowered, kept) if kept is not None else None
    cut = cut_over_tp(recipe.model, recipe.axes.tp, recipe.sharding).params
    slots, shards = _optimizer_slots(recipe), recipe.axes.dp_shard * recipe.axes.cp
    found = []
    for rank in range(recipe.schedule.num_ranks):
        mine = [recipe.stages[stage] for stage in recipe.schedule.stages_of(rank)]
        held = _held(mine)
        trained = [path for path in held if recipe.model.is_trainable(path)]
        sizes = {
            path: leaf.numel() * leaf.element_size() // (recipe.axes.tp if path in cut else 1)
            for path, leaf in held.items()
        }
        gathered = [_gathered(recipe, mine, cut)]
        if recipe.sharding.reshard_after_forward:  # the stage in use, and those gathered ahead
            gathered = sorted(_gathered(recipe, [stage], cut) for stage in mine)[-1 - recipe.sharding.prefetch :]
        found.append(
            RankPlan(
                rank,
                sum(sizes.values()) // shards,
                sum(gathered),
                int(sum(slots[path] * sizes[path] for path in trained)) // shards,
                None if peaks is None else int(peaks[rank]),
                connections[rank],
                most_bytes(connections[rank], recipe.transfers) if uses_nccl else None,
            )
        )
    return found


def _gathered(recipe: Recipe, stages: Sequence[Stage], cut: Collection[str]) -> int:
    """Return the bytes of the copies of parameters that a step makes; 0 if it computes with the kept ones."""
    axes, experts = recipe.axes, recipe.model.expert_paths if recipe.axes.ep > 1 else frozenset()
    total = 0
    for path, leaf in _held(stages).items():
        dtype = recipe.sharding.precision.parameter_dtype(leaf.dtype)
        over = axes.tp if path in cut else axes.ep if path in experts else 1
        if axes.dp_shard * axes.cp > 1 or dtype != leaf.dtype:
            total += leaf.numel() // over * dtype.itemsize
    return total


def _held(stages: Sequence[Stage]) -> dict[str, torch.Tensor]:
    """Return meta tensors of the parameters of some stages, by canonical path."""
    model = stages[0].model
    return {path: model.spec[path] for stage in stages for path in stage.paths}


def _optimizer_slots(recipe: Recipe) -> dict[str, float]:
    """Return, by path of each trained parameter, the optimizer's state elements per element of the parameter."""
    found: dict[str, float] = {}
    separate = recipe.optimizer.separate()
    for part, paths in recipe.optimizer.assigned(path for path in recipe.model.spec if recipe.model.is_trainable(path)):
        params, alone = tree.to_tensordict({"weight": torch.zeros(16, 16)}), separate[part]
        _, state = alone.update(params.clone(), alone.init(params), params)
        numbers = sum(leaf.numel() for leaf in tree.flatten(state).values() if leaf.numel() > 1)
        found |= dict.fromkeys(paths, numbers / 256)
    return found


def _kept(recipe: Recipe) -> tuple[StageBytes, ...] | None:
    """Return what each stage keeps, from its captured graph; None if only the ranks themselves can tell."""
    if recipe.options.engine != "graph":
        return None
    try:
        if recipe.axes.tp > 1:
            return kept_over_tp(recipe)
        return kept_bytes(recipe, pipe_alone(recipe))
    except AutofuncError:
        if recipe.options.memory_budget is not None:
            raise  # nothing fits
        return None  # a size depends on data
