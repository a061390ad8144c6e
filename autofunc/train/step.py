"""One step of a run: from the rows of a batch to new parameters."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.data import Part
from autofunc.errors import PipelineRunError
from autofunc.mesh import same_over
from autofunc.pipe import Pipeline
from autofunc.random import fold_in, make_key
from autofunc.runtime.plan import Mode
from autofunc.train.average import in_place, moved_on
from autofunc.train.batches import Batch
from autofunc.train.bubble import BubbleMeter
from autofunc.train.nonfinite import NonFinite
from autofunc.train.recipe import Recipe
from autofunc.train.weighing import gradients, together


@dataclass(frozen=True)
class Trained:
    """What a run has made so far, of this rank."""

    params: TensorDict
    state: TensorDict  # what its layers keep from step to step
    optimizer_state: TensorDict
    average: TensorDict | None = None  # of the parameters that are trained; None where none is wanted


def validated_params(recipe: Recipe, now: Trained) -> TensorDict:
    """What is validated: the parameters, or their average where that is wanted."""
    return in_place(now.average, now.params) if recipe.validates_average and now.average is not None else now.params


class Taken(NamedTuple):
    """What a step gives."""

    now: Trained
    loss: float
    norm: float  # of the gradients, before they are clipped
    lr: float | None  # None where the optimizer has none
    bubble: float | None  # the fraction of time that ranks were idle; None where that was not measured
    is_skipped: bool = False  # for it was not finite; then all is as before


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
) -> Taken:
    """Train on a batch; `before` is donated.

    Args:
        recipe: what to do.
        pipe: of the run.
        before: what there is.
        batch: what to train on.
        step: its number, from 1 on.
        device: where it is.
        meter: measures the first part now and then.
        nonfinite: what becomes of a loss or gradient that is no number.
        meanwhile: what the host does while the device computes, before it waits for the loss.

    Raises:
        NotFiniteError: when that ends the run, saying where it begins.
        PipelineRunError: when ranks have read different rows, or no row has a label.
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
    loss, weight = together(results)  # before the parameters change, which are needed to find out why it is NaN
    _check_rows(batch.parts, pipe.mesh, device, step)
    if not weight:
        raise PipelineRunError(f"no row of step {step} has a label to learn from (all are -100?)")
    grads = gradients(results)
    norm = pipe.global_norm(grads)
    norm_value = norm.item()
    lr = None if recipe.lr_at is None else recipe.lr_at(step)
    taken = partial(Taken, loss=loss, norm=norm_value, lr=recipe.optimizer.lr if lr is None else lr, bubble=bubble)
    if math.isfinite(loss) and math.isfinite(norm_value):
        nonfinite.passed()
    else:  # before the update, after which nobody could say where that began
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm_value}"
        if nonfinite.met(pipe, ran, f"{what} at step {step}"):
            return taken(before, is_skipped=True)
    del ran
    if recipe.max_norm is not None:
        grads = pipe.scaled(grads, norm, recipe.max_norm)
    params, optimizer_state = recipe.optimizer.update(grads, before.optimizer_state, params, lr=lr)
    average = before.average
    if average is not None and recipe.ema is not None and step % recipe.ema.every_steps == 0:
        average = moved_on(recipe.model, average, params, recipe.ema.decay)
    return taken(Trained(params, state, optimizer_state, average))


def _check_rows(parts: Sequence[Part], mesh: DeviceMesh | None, device: torch.device, step: int) -> None:
    """Refuse a step for which ranks of a pipeline have read other rows than their neighbours."""
    number = 0
    for leaf in (leaf for part in parts for leaf in part.batch.values()):
        number = zlib.crc32(leaf.contiguous().view(torch.uint8).numpy().data, number)
    if not same_over(mesh, ("pp", "cp", "tp"), number, device):
        raise PipelineRunError(
            f"the ranks of a pipeline have read different rows for step {step}: the dataset gives another row each time it "
            "is asked. Let it draw from the generators of Python, numpy or torch, which are seeded for each row"
        )
