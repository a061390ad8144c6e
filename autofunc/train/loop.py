"""The training loop: data in, parameters, metrics and checkpoints out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from autofunc.counted_rows import weighed
from autofunc.data import STACKED, Part
from autofunc.errors import PipelineRunError
from autofunc.mesh import data_coordinate
from autofunc.pipe import Pipeline
from autofunc.runtime.position import here
from autofunc.schedule import Timeline
from autofunc.timing import clock
from autofunc.train.agreed import Flags
from autofunc.train.batches import Batches
from autofunc.train.bubble import BubbleMeter
from autofunc.train.checkpoints import Checkpoints
from autofunc.train.documents_apart import check_documents_apart
from autofunc.train.garbage import collecting_between
from autofunc.train.nonfinite import NonFinite
from autofunc.train.preemption import Stop, noticed
from autofunc.train.progress import Reporter
from autofunc.train.recipe import Recipe
from autofunc.train.records import Records
from autofunc.train.resume import extra_of, fresh, restored
from autofunc.train.speed import Speedometer, peaks_of_all, units_of
from autofunc.train.step import take_step, validated_params
from autofunc.train.step_folders import VALIDATION_LOSS
from autofunc.train.validation import Validated, Validation
from autofunc.transform import pipeline


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    pipe: Pipeline
    params: TensorDict  # of this rank
    state: TensorDict  # of this rank: what its layers carry from step to step
    average: TensorDict | None  # of this rank's trained parameters, if the run keeps one
    num_steps: int
    loss: float  # of the last step
    validated: Validated | None  # of the last validation
    training_seconds: float  # without validation
    peak_memory_bytes: tuple[int, ...]  # by process
    timeline: Timeline | None  # of the last measured step
    stopped: bool = False  # told to end early, after writing a checkpoint
    ended_early: bool = False  # the validation loss stopped improving


def train(
    recipe: Recipe,
    mesh: DeviceMesh | None,
    device: torch.device,
    reporter: Reporter,
    metrics: Records | None,
    checkpoints: Checkpoints | None = None,
    source: Path | None = None,
) -> TrainResult:
    """Train, and measure the validation loss at the end.

    Args:
        recipe: of the run.
        mesh: this process's mesh; None runs every pp rank in this process.
        device: where parameters and batches live.
        reporter: told about every step.
        metrics: receives every step's values; None on all ranks but the first.
        checkpoints: writes them; if given, SIGTERM ends the run after the current step, with a checkpoint.
        source: the checkpoint to resume from.
    """
    pipe = build_pipe(recipe, mesh)
    place, places = data_coordinate(mesh)
    begun = fresh(recipe, pipe, device) if source is None else restored(source, recipe, pipe, device)
    check_documents_apart(recipe, pipe, begun.trained.params, begun.trained.state, device)
    loader = recipe.make_train_loader(place=place, places=places, start=begun.position)
    for note in begun.notes:
        reporter.note(note)
    now, step, loss, patience = begun.trained, begun.step, float("nan"), begun.patience
    validated: Validated | None = None
    training_seconds, is_stopped, is_over = 0.0, False, False
    bubbles, validation = BubbleMeter(mesh, device, recipe.num_steps), Validation(recipe, pipe, device, reporter)
    nonfinite = NonFinite(recipe.nonfinite, recipe.max_skips, reporter.note)
    meter = Speedometer(recipe, device, reporter.note) if metrics is not None else None

    with noticed() if checkpoints is not None else nullcontext(Stop()) as stop:
        clock.done("making the weights")
        began = time.perf_counter()
        batches = Batches(itertools.islice(_endless(loader), recipe.num_steps - begun.step), device)
        for batch in collecting_between(batches, recipe.gc_every_steps):
            step += 1
            taken = take_step(
                recipe,
                pipe,
                now,
                batch,
                step,
                device,
                bubbles,
                nonfinite,
                batches.read_ahead,
                partial(_flags, checkpoints, stop),
            )
            now, loss = taken.now, taken.loss
            if step == begun.step + 1:
                clock.done("the first step")
                clock.stop()
            seconds = time.perf_counter() - began  # including the wait for data
            training_seconds += seconds
            if metrics is not None and meter is not None:
                speed = meter.of(*_units(batch.parts), seconds)
                rate = f"  lr {taken.lr:.2e}" if recipe.lr_at is not None else ""  # only if it changes
                reporter.step(step, loss, f"{speed.text()}{rate}", taken.bubble)
                more = {} if taken.bubble is None else {"bubble_fraction": taken.bubble}
                more |= {"skipped": True} if taken.is_skipped else {}
                metrics.write(step=step, loss=loss, grad_norm=taken.norm, lr=taken.lr, **speed.named(), **more)
            position, is_last = batch.parts[-1].after, step == recipe.num_steps
            is_due = False
            if checkpoints is not None:
                # a single process need not agree with others: act on the latest request
                flags = taken.flags if mesh is not None else _flags(checkpoints, stop)
                if not flags.is_writing:
                    checkpoints.finish()
                is_stopped = flags.is_asked_to_end
                is_due = is_stopped or checkpoints.is_due(step, position.begins_epoch)
            measured = None
            if is_last or (is_due and not is_stopped) or (recipe.val_every_steps and step % recipe.val_every_steps == 0):
                measured = validation.run(validated_params(recipe, now), now.state)
            if measured is not None:
                validated = measured
                if measured.loss is not None:
                    patience = patience.after(measured.loss, recipe.early_stopping)
                is_over = patience.is_over(recipe.early_stopping)
                if not is_last and not is_over:  # the last validation is part of the result
                    reporter.validation(step, measured.text())
                if metrics is not None:
                    metrics.write(step=step, **measured.named())
            if checkpoints is not None and (is_due or is_last or is_over):
                found = None if measured is None else measured.loss
                extra = {**extra_of(recipe, step, position, patience), "loss": loss, VALIDATION_LOSS: found}
                is_saved = checkpoints.save(step, pipe, now, extra)
                if is_stopped and not is_saved:
                    raise PipelineRunError(f"told to end by SIGTERM after step {step}, and no checkpoint could be written")
            if is_stopped or is_over:
                break
            began = time.perf_counter()
        if checkpoints is not None:
            checkpoints.finish()
    is_early = step < recipe.num_steps
    return TrainResult(
        pipe, now.params, now.state, now.average, step, loss, validated, training_seconds, peaks_of_all(device),
        bubbles.timeline, stopped=is_early and not is_over, ended_early=is_early and is_over,
    )  # fmt: skip


def _flags(checkpoints: Checkpoints | None, stop: Stop) -> Flags:
    """Return this process's flags for the other processes."""
    return Flags(stop.is_asked, checkpoints is not None and checkpoints.is_busy)


def build_pipe(recipe: Recipe, mesh: DeviceMesh | None) -> Pipeline:
    """Build the pipeline of a recipe."""
    options = asdict(recipe.options)
    return pipeline(
        recipe.stages, recipe.schedule, loss=weighed(recipe.loss, recipe.microbatch_rows), mesh=mesh,
        sharding=recipe.sharding, transfers=recipe.transfers, batch_dims=STACKED, **options,
    )  # fmt: skip


def _endless(loader: Iterable[Part]) -> Iterator[list[Part]]:
    """Yield the parts of one batch after another, epoch after epoch."""
    parts: list[Part] = []
    here.enter("reading rows")
    while True:
        for part in loader:
            parts.append(part)
            if part.ends_batch:
                yield parts
                parts = []
                here.enter("reading rows")


def _units(parts: Sequence[Part]) -> tuple[int, str]:
    """Return the size of a batch over all places, and its unit."""
    counted = [units_of(part.batch, part.num_rows) for part in parts]
    return sum(count for count, _ in counted), counted[0][1]
