"""The training loop: data in, parameters and metrics out."""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.data import STACKED, Part
from autofunc.errors import NotFiniteError, PipelineRunError, full_message
from autofunc.mesh import data_coordinate, same_over
from autofunc.pipe import Pipeline
from autofunc.random import fold_in, make_key
from autofunc.runtime.plan import Mode
from autofunc.runtime.position import here
from autofunc.timing import clock
from autofunc.train.metrics import MetricsFile
from autofunc.train.progress import Reporter
from autofunc.train.recipe import Recipe
from autofunc.train.weighing import gradients, together, weighed
from autofunc.transform import pipeline


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
    place, places = data_coordinate(mesh)
    params, state = pipe.init(recipe.init_seed, device), pipe.init_state(device)
    optimizer_state = recipe.optimizer.init(params)
    loader = recipe.make_train_loader(place=place, places=places)
    training_seconds, loss_value = 0.0, float("nan")
    validation_loss: float | None = None

    clock.done("making the weights")
    began = time.perf_counter()
    for step, parts in enumerate(itertools.islice(_endless(loader), recipe.num_steps), start=1):
        ran, results = [], []
        for number, part in enumerate(parts):
            key = (recipe.seed, step) if number == 0 else fold_in(make_key(recipe.seed, step, device=device), number)
            ran.append((to_device(part.batch, device), key, state))
            results.append(pipe.run(Mode.GRADS, params, *ran[-1]))
            state = tree.to_tensordict(results[-1].state)
        loss_value, weight = together(results)  # before the parameters change, which are needed to find out why it is NaN
        _check_rows(parts, mesh, device, step)
        if not weight:
            raise PipelineRunError(f"no row of step {step} has a label to learn from (all are -100?)")
        if not math.isfinite(loss_value):
            raise _not_finite(pipe, [(params, *each) for each in ran], f"the loss is {loss_value} at step {step}")
        grads = gradients(results)
        norm = pipe.global_norm(grads)
        if not math.isfinite(norm_value := norm.item()):  # after the update nobody could say where that began
            raise _not_finite(
                pipe, [(params, *each) for each in ran], f"the gradient's norm is {norm_value} at step {step}"
            )
        del ran
        if recipe.max_norm is not None:
            grads = pipe.scaled(grads, norm, recipe.max_norm)
        params, optimizer_state = recipe.optimizer.update(grads, optimizer_state, params)
        seconds = time.perf_counter() - began  # the wait for data included
        training_seconds += seconds
        tokens = sum(_count_tokens(part) for part in parts)
        reporter.step(step, loss_value, f"{tokens / seconds:,.0f} {_unit(parts)}/s")
        if metrics is not None:
            metrics.write(step=step, loss=loss_value, grad_norm=norm_value, num_tokens=tokens, step_time_ms=seconds * 1e3)
        if step == recipe.num_steps or (recipe.val_every_steps and step % recipe.val_every_steps == 0):
            validation_loss = validate(recipe, pipe, params, state, device, reporter)
            if validation_loss is not None:
                if step < recipe.num_steps:  # the last is in what the run ends with
                    reporter.validation(step, validation_loss)
                if metrics is not None:
                    metrics.write(step=step, validation_loss=validation_loss)
        if step == 1:
            clock.done("the first step")
            clock.stop()
        began = time.perf_counter()
    return TrainResult(pipe, params, state, recipe.num_steps, loss_value, validation_loss, training_seconds)


def build_pipe(recipe: Recipe, mesh: DeviceMesh | None) -> Pipeline:
    """The pipeline of a recipe."""
    options = asdict(recipe.options)
    return pipeline(
        recipe.stages, recipe.schedule, loss=weighed(recipe.loss, recipe.microbatch_rows), mesh=mesh,
        sharding=recipe.sharding, batch_dims=STACKED, **options,
    )  # fmt: skip


def validate(
    recipe: Recipe, pipe: Pipeline, params: TensorDict, state: TensorDict, device: torch.device, reporter: Reporter
) -> float | None:
    """The mean loss over the validation dataset, weighted as the loss says; None without one, or without labels in it.

    Args:
        recipe: for its validation loader.
        pipe: of the run.
        params: of this rank.
        state: of this rank.
        device: where batches go.
        reporter: told of every part of a batch.
    """
    if recipe.make_validation_loader is None:
        return None
    place, places = data_coordinate(pipe.mesh)
    loader = recipe.make_validation_loader(place=place, places=places)
    results = []
    for index, part in enumerate(loader, start=1):
        results.append(pipe.run(Mode.LOSS, params, to_device(part.batch, device), None, state))
        reporter.validating(index, len(loader))
    loss, weight = together(results)
    return loss if weight else None


def _endless(loader: Iterable[Part]) -> Iterator[list[Part]]:
    """The parts of one batch after the other, epoch after epoch."""
    parts: list[Part] = []
    here.enter("reading rows")
    while True:
        for part in loader:
            parts.append(part)
            if part.ends_batch:
                yield parts
                parts = []
                here.enter("reading rows")


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return tree.map_leaves(  # type: ignore[no-any-return]
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, dict(batch)
    )


def _count_tokens(part: Part) -> int:
    """Tokens of a part over all places, or its rows where they have none."""
    ids = part.batch.get("input_ids")
    return part.num_rows * (ids[0].numel() if ids is not None else 1)


def _unit(parts: Sequence[Part]) -> str:
    """What `_count_tokens` counts."""
    return "tokens" if any("input_ids" in part.batch for part in parts) else "rows"


def _not_finite(pipe: Pipeline, ran: Iterable[tuple[Any, ...]], what: str) -> NotFiniteError:
    """What a step made that was not finite, found by running it once more. All processes know that it was, so all do.

    Args:
        pipe: of the run.
        ran: what each part of the step was called with.
        what: what is known.
    """
    for arguments in ran:
        try:
            pipe.check_finite(*arguments)
        except NotFiniteError as found:
            return NotFiniteError(f"{what}; {full_message(found)}")
    return NotFiniteError(f"{what}, but not when the step is run again: its values depend on more than its arguments")


def _check_rows(parts: Sequence[Part], mesh: DeviceMesh | None, device: torch.device, step: int) -> None:
    """Refuse a step for which ranks of a pipeline have read other rows than their neighbours."""
    number = 0
    for leaf in (leaf for part in parts for leaf in part.batch.values()):
        number = zlib.crc32(leaf.contiguous().view(torch.uint8).numpy().data, number)
    if not same_over(mesh, ("pp", "tp"), number, device):
        raise PipelineRunError(
            f"the ranks of a pipeline have read different rows for step {step}: the dataset gives another row each time it "
            "is asked. Let it draw from the generators of Python, numpy or torch, which are seeded for each row"
        )
