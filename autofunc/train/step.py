"""One step of a run, from the rows of a batch to updated parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDict

from autofunc import tree
from autofunc.errors import PipelineRunError
from autofunc.losses import NO_WEIGHT
from autofunc.pipe import Pipeline
from autofunc.random import fold_in, make_key
from autofunc.runtime.plan import Mode
from autofunc.train.agreed import Flags, agree
from autofunc.train.average import in_place, moved_on
from autofunc.train.batches import Batch
from autofunc.train.bubble import BubbleMeter
from autofunc.train.nonfinite import NonFinite
from autofunc.train.recipe import Recipe
from autofunc.train.weighing import gradients, together


@dataclass(frozen=True)
class Trained:
    """The training state of this rank."""

    params: TensorDict
    state: TensorDict  # what its layers carry from step to step
    optimizer_state: TensorDict
    average: TensorDict | None = None  # of the trained parameters, if the run keeps one


def validated_params(recipe: Recipe, now: Trained) -> TensorDict:
    """Return what to validate: the parameters, or their average if configured."""
    return in_place(now.average, now.params) if recipe.validates_average and now.average is not None else now.params


class Taken(NamedTuple):
    """The result of a step."""

    now: Trained
    loss: float
    norm: float  # of the gradients, before clipping
    lr: float | None  # None if the optimizer has none
    bubble: float | None  # idle fraction of the ranks' time; None if not measured
    flags: Flags  # flags of all processes, at this step
    is_skipped: bool = False  # because it was not finite; the state is unchanged


def take_step(
    recipe: Recipe,
    pipe: Pipeline,
    before: Trained,
    batch: Batch,
    step: int,
    device: torch.device,
    meter: BubbleMeter,
    nonfinite: NonFinite,
    meanwhile: Callable[[], None] = lambda: None,
    own_flags: Callable[[], Flags] = Flags,
) -> Taken:
    """Train on a batch; `before` is donated.

    Args:
        recipe: of the run.
        pipe: of the run.
        before: the training state.
        batch: to train on.
        step: its number, from 1.
        device: of the batch.
        meter: measures the first part of some steps.
        nonfinite: decides about a loss or gradient that is not finite.
        meanwhile: work for the host while the device computes, before it waits for the loss.
        own_flags: returns this process's flags; called while the device computes.

    Raises:
        NotFiniteError: if such a step ends the run; tells where the values first appear.
        PipelineRunError: if ranks have read different rows, or no row has a label.
    """
    params, state, bubble = before.params, before.state, None
    ran, results = [], []
    for number, sent in enumerate(batch.sent):
        key = (recipe.seed, step) if number == 0 else fold_in(make_key(recipe.seed, step, device=device), number)
        ran.append((params, sent, key, state))
        run = partial(pipe.run, Mode.GRADS, *ran[-1])
        if number == 0:
            result, bubble = meter.run(step, run)
        results.append(result if number == 0 else run())
        state = tree.to_tensordict(results[-1].state)
    meanwhile()
    is_same, flags = agree(pipe.mesh, batch.parts, own_flags(), device)
    if not is_same:
        raise PipelineRunError(
            f"the ranks of a pipeline have read different rows for step {step}: the dataset returns a different row each "
            "time it is asked. Let it draw from the generators of Python, numpy or torch, which are seeded for each row"
        )
    loss, weight = together(results)  # before the parameters change: they are needed to find the cause of a NaN
    if not weight:
        raise PipelineRunError(f"step {step}: {NO_WEIGHT}")
    grads = gradients(results)
    norm = pipe.global_norm(grads)
    norm_value = norm.item()
    lr = None if recipe.lr_at is None else recipe.lr_at(step)
    rate = recipe.optimizer.lr if lr is None else lr
    taken = partial(Taken, loss=loss, norm=norm_value, lr=rate, bubble=bubble, flags=flags)
    if math.isfinite(loss) and math.isfinite(norm_value):
        nonfinite.passed()
    else:  # before the update, which would hide where the values first appear
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm_value}"
        if nonfinite.handle(pipe, ran, f"{what} at step {step}"):
            return taken(before, is_skipped=True)
    del ran
    if recipe.max_norm is not None:
        grads = pipe.scaled(grads, norm, recipe.max_norm)
    params, optimizer_state = recipe.optimizer.update(grads, before.optimizer_state, params, lr=lr)
    average = before.average
    if average is not None and recipe.ema is not None and step % recipe.ema.every_steps == 0:
        average = moved_on(recipe.model, average, params, recipe.ema.decay)
    return taken(Trained(params, state, optimizer_state, average))
