"""Whether a run fits its memory budget: found on fake tensors, before a process is started."""

from __future__ import annotations

from dataclasses import replace

import torch

from autofunc.errors import AutofuncError, ConfigError
from autofunc.shard import Sharding
from autofunc.train.autoschedule import search_limits
from autofunc.train.loop import build_pipe
from autofunc.train.recipe import Recipe


def check_budget(recipe: Recipe) -> None:
    """Capture all stages and work out what they keep; without a budget there is nothing to do.

    With an accelerator only the ranks themselves can tell: its kernels keep other values than those of the CPU; and with
    several tp ranks, which each keep their part.

    Raises:
        ConfigError: when the budget is too small.
    """
    budget = recipe.search_budget if recipe.options.memory_budget is None else recipe.options.memory_budget
    if budget is None or recipe.axes.tp > 1 or torch.accelerator.is_available():
        return
    # compiled pieces keep what the others keep
    alone = Sharding(mp_policy=recipe.sharding.mp_policy)
    pipe = build_pipe(replace(recipe, options=replace(recipe.options, compile=False), sharding=alone), None)
    batch, key = recipe.example(), (recipe.seed, 1)
    try:
        if recipe.searches:
            search_limits(recipe, pipe.memory(pipe.init(device="meta"), batch, key))
        else:
            pipe.build(batch, key=key)
    except ConfigError:
        raise
    except AutofuncError as error:
        raise ConfigError(f"distributed: {error}") from error
