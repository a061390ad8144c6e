"""The training loop: data in, parameters and metrics out."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.data import STACKED
from autofunc.errors import NotFiniteError, full_message
from autofunc.losses import Loss, evaluate
from autofunc.mesh import data_coordinate
from autofunc.pipe import Pipeline
from autofunc.train.metrics import MetricsFile
from autofunc.train.progress import Reporter
from autofunc.train.recipe import Recipe
from autofunc.transform import pipeline, value_and_grad


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with."""

    pipe: Pipeline
    params: TensorDict  # of this rank
    state: TensorDict  # of this rank: what its layers keep from step to step
    num_steps: int
    loss: float  # of the last step
    validation_loss: float | None
    training_seconds: float  # without validation


def train(
    recipe: Recipe,
    mesh: DeviceMesh | None,
    device: torch.device,
    reporter: Reporter,
    metrics: MetricsFile | None,
) -> TrainResult:
    """Train, and measure the validation loss at the end.

    Args:
        recipe: what to do.
        mesh: this process's mesh; None runs every pp rank in this process.
        device: where parameters and batches live.
        reporter: told of every step.
        metrics: where every step is written; None on all ranks but the first.
    """
    pipe = build_pipe(recipe, mesh)
    validation_pipe = pipe.with_loss(_with_weight(recipe.loss))
    place, places = data_coordinate(mesh)
    step_function = value_and_grad(pipe, has_state=True)
    params, state = pipe.init(recipe.init_seed, device), pipe.init_state(device)
    optimizer_state = recipe.optimizer.init(params)
    loader = recipe.make_train_loader(place=place, places=places)
    training_seconds, loss_value = 0.0, float("nan")
    validation_loss: float | None = None

    clock = time.perf_counter()
    for step, batch in enumerate(itertools.islice(_endless(loader), recipe.num_steps), start=1):
        batch = to_device(batch, device)
        key, before = (recipe.seed, step), state
        (loss, state), grads = step_function(params, batch, key, state)
        loss_value = loss.item()  # before the parameters change, which are needed to find out why
        if not math.isfinite(loss_value):
            raise _not_finite(pipe, (params, batch, key, before), loss_value, step)
        del before
        norm = None
        if recipe.max_norm is not None:
            grads, norm = pipe.clip(grads, recipe.max_norm)
        params, optimizer_state = recipe.optimizer.update(grads, optimizer_state, params)
        seconds = time.perf_counter() - clock  # the wait for data included
        training_seconds += seconds
        tokens = _count_tokens(batch) * places
        reporter.step(step, loss_value, tokens / seconds)
        if metrics is not None:
            extra = {} if norm is None else {"grad_norm": norm.item()}
            metrics.write(step=step, loss=loss_value, **extra, num_tokens=tokens, step_time_ms=seconds * 1e3)
        if step == recipe.num_steps or (recipe.val_every_steps and step % recipe.val_every_steps == 0):
            validation_loss = validate(recipe, validation_pipe, params, state, device, reporter)
            if validation_loss is not None:
                reporter.validation(step, validation_loss)
                if metrics is not None:
                    metrics.write(step=step, validation_loss=validation_loss)
        clock = time.perf_counter()
    return TrainResult(pipe, params, state, recipe.num_steps, loss_value, validation_loss, training_seconds)


def build_pipe(recipe: Recipe, mesh: DeviceMesh | None) -> Pipeline:
    """The pipeline of a recipe."""
    options = asdict(recipe.options)
    return pipeline(
        recipe.stages, recipe.schedule, loss=recipe.loss, mesh=mesh, sharding=recipe.sharding, batch_dims=STACKED, **options
    )  # fmt: skip


def validate(
    recipe: Recipe, pipe: Pipeline, params: TensorDict, state: TensorDict, device: torch.device, reporter: Reporter
) -> float | None:
    """The mean loss over the validation dataset, weighted as the loss says; None without a validation dataset.

    Args:
        recipe: for its validation loader.
        pipe: whose loss gives its weight as aux.
        params: of this rank.
        state: of this rank.
        device: where batches go.
        reporter: told of every batch.
    """
    if recipe.make_validation_loader is None:
        return None
    total, weight = 0.0, 0.0
    place, places = data_coordinate(pipe.mesh)
    loader = recipe.make_validation_loader(place=place, places=places)
    for index, batch in enumerate(loader, start=1):
        loss, batch_weight = pipe(params, to_device(batch, device), state=state, has_aux=True)
        reporter.validating(index, len(loader))
        total += loss.item() * batch_weight.item()
        weight += batch_weight.item()
    return total / weight


def _with_weight(loss: Loss | None) -> Loss:
    """The same loss, with its weight as aux."""

    def weighed(outputs: Any, microbatch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        terms = evaluate(loss, outputs, microbatch)
        return terms.sum, terms.weight, terms.weight

    return weighed


def _endless(loader: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    while True:
        yield from loader


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return tree.map_leaves(  # type: ignore[no-any-return]
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, dict(batch)
    )


def _count_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a batch, or its rows where it has none."""
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    leaves = [leaf for leaf in tree.leaves_and_spec(dict(batch))[0] if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return int(leaves[0].shape[0])


def _not_finite(pipe: Pipeline, arguments: tuple[Any, ...], loss: float, step: int) -> NotFiniteError:
    """What a step made that was not finite, found by running it once more. All processes have the same loss, so all do."""
    what = f"the loss is {loss} at step {step}"
    try:
        pipe.check_finite(*arguments)
    except NotFiniteError as found:
        return NotFiniteError(f"{what}; {full_message(found)}")
    return NotFiniteError(f"{what}, but not when the step is run again: its values depend on more than its arguments")
