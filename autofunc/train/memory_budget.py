"""The bytes a run's stages keep, and whether they fit its memory budget: found on fake tensors, before processes start."""

from __future__ import annotations

from dataclasses import replace

import torch

from autofunc.counted_rows import weighed
from autofunc.data import STACKED
from autofunc.errors import AutofuncError, ConfigError
from autofunc.pipe import Pipeline
from autofunc.schedule import StageBytes
from autofunc.shard import Sharding
from autofunc.shard.parameters import Parameters
from autofunc.train.autoschedule import search_limits
from autofunc.train.axes import Axes, setting_alone
from autofunc.train.loop import build_pipe
from autofunc.train.recipe import Recipe
from autofunc.train.tensor_parallel_check import imagined
from autofunc.train.weighing import counting_all


def check_budget(recipe: Recipe) -> None:
    """Capture all stages and compute what they keep; a no-op without a budget.

    With an accelerator only the ranks themselves can tell, because its kernels keep different values than the CPU's; the
    same goes for several tp ranks, each of which keeps its part.

    Raises:
        ConfigError: if the budget is too small.
    """
    budget = recipe.search_budget if recipe.options.memory_budget is None else recipe.options.memory_budget
    if budget is None or recipe.axes.tp > 1 or torch.accelerator.is_available():
        return
    pipe, batch = pipe_alone(recipe), counting_all(recipe.example())
    try:
        if recipe.searches:
            search_limits(recipe, kept_bytes(recipe, pipe))
        else:
            pipe.build(batch, key=(recipe.seed, 1))
    except ConfigError:
        raise
    except AutofuncError as error:
        raise ConfigError(f"distributed: {error}") from error


def pipe_alone(recipe: Recipe) -> Pipeline:
    """Return the recipe's pipeline on this process alone, uncompiled: compiled pieces keep the same values.

    With several cp ranks, or ranks that share experts, it stands for one of them: it can be captured, but not run.
    """
    sharding = Sharding(mp_policy=recipe.sharding.mp_policy, expert_parallel=recipe.sharding.expert_parallel)
    pipe = build_pipe(replace(recipe, options=replace(recipe.options, compile=False), sharding=sharding), None)
    context = setting_alone(recipe.axes, recipe.sharding).context
    if context is None:
        return pipe
    parameters = Parameters(recipe.stages, recipe.model, None, sharding, context)
    return Pipeline(
        pipe.stages, pipe.schedule, pipe.loss, None, pipe.options, STACKED, sharding, pipe.transfers, parameters=parameters
    )


def kept_over_tp(recipe: Recipe) -> tuple[StageBytes, ...]:
    """Return the bytes each stage keeps per microbatch on the first of several tp ranks.

    Raises:
        AutofuncError: see `kept_bytes`.
    """
    stages, model = recipe.stages, recipe.model
    chosen = recipe.sharding
    sharding = Sharding(
        mp_policy=chosen.mp_policy, tensor_parallel=chosen.tensor_parallel, sequence_parallel=chosen.sequence_parallel
    )
    with imagined(Axes(tp=recipe.axes.tp)) as mesh:
        pipe = Pipeline(
            stages, recipe.schedule, weighed(recipe.loss, recipe.microbatch_rows), None,
            replace(recipe.options, compile=False), STACKED, sharding, recipe.transfers, True,
            Parameters(stages, model, mesh, sharding, setting_alone(recipe.axes, chosen).context),
        )  # fmt: skip
        return pipe.memory(model.init(None, "meta"), counting_all(recipe.example()), (recipe.seed, 1))


def kept_bytes(recipe: Recipe, pipe: Pipeline) -> tuple[StageBytes, ...]:
    """Return the bytes each stage keeps per microbatch.

    Args:
        recipe: provides the example.
        pipe: see `pipe_alone`.

    Raises:
        AutofuncError: if a size depends on data, or the recipe's memory budget is too small.
    """
    return pipe.memory(pipe.init(recipe.seed, "meta"), counting_all(recipe.example()), (recipe.seed, 1))
