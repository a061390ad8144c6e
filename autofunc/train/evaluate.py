"""One process of `autofunc evaluate`: a run's validation, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from autofunc.checkpoint import check_fits, load
from autofunc.checkpoint.write import is_first, of_first
from autofunc.config import FinetuneConfig
from autofunc.errors import CheckpointError, ConfigError
from autofunc.pipe import Pipeline
from autofunc.progress_bar import note
from autofunc.shown import literal, shown
from autofunc.train.average import in_place
from autofunc.train.documents_apart import check_documents_apart
from autofunc.train.logs import line_console
from autofunc.train.loop import build_pipe
from autofunc.train.model import OWN, SEED
from autofunc.train.progress import ProgressReporter, Reporter, Silent
from autofunc.train.recipe import Recipe
from autofunc.train.resume import source, step_at
from autofunc.train.validation import Validated, Validation
from autofunc.train.watched import watched


def to_evaluate(config: FinetuneConfig) -> FinetuneConfig:
    """Reduce a configuration to what an evaluation needs; training data is not read.

    Raises:
        ConfigError: without a validation dataset.
    """
    if config.leading_validation is None:
        raise ConfigError("evaluate measures on validation_dataset, and there is none")
    return config.model_copy(update={"dataset": config.validations[config.leading_validation]})


def check_evaluation(recipe: Recipe, path: Path | None) -> None:
    """Refuse a checkpoint of a different model, before processes start.

    Raises:
        ConfigError: describing the difference.
    """
    if path is not None:
        try:
            check_fits(path, recipe.model)
        except CheckpointError as error:
            raise ConfigError(f"checkpoint.restore_from: {error}") from error


def evaluate(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, output_dir: Path, config: FinetuneConfig, as_json: bool
) -> None:
    """Measure a checkpoint or the configured weights; the first rank shows the result.

    Args:
        recipe: of the run.
        mesh: this process's mesh; None runs every pp rank in this process.
        device: where parameters and batches live.
        output_dir: of the run, for its checkpoints.
        config: for the checkpoint, and the timeouts.
        as_json: print the result as JSON.
    """
    is_shown = is_first()
    console = line_console()
    path = of_first(source(config.checkpoint, output_dir, writes=False))
    if is_shown and not as_json:
        console.print(literal(_which(path, config)))
    with watched(config.distributed):
        if not is_shown or as_json:
            found = _validated(recipe, mesh, device, path, Silent())
        else:
            with ProgressReporter(console, 0) as reporter:
                found = _validated(recipe, mesh, device, path, reporter)
    if is_shown:
        named, names = {} if found is None else found.named(), " and ".join(recipe.validation_datasets)
        if as_json:
            sys.stdout.write(
                json.dumps({"checkpoint": None if path is None else str(path), "step": step_at(path), **named})
            )
            sys.stdout.write("\n")
        else:
            console.print(literal(found.text() if found is not None else f"no row of {names} has a label"))


def _which(path: Path | None, config: FinetuneConfig) -> str:
    """Name the measured weights."""
    if path is not None:
        return f"checkpoint: {path}, after step {step_at(path)}"
    return "initial weights" if config.weights in (None, OWN, SEED) else f"weights: {config.weights}"


def _validated(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, path: Path | None, reporter: Reporter
) -> Validated | None:
    pipe = build_pipe(recipe, mesh)
    params, state = weights_of(path, recipe, pipe, device)
    check_documents_apart(recipe, pipe, params, state, device)
    return Validation(recipe, pipe, device, reporter).run(params, state)


def weights_of(
    path: Path | None, recipe: Recipe, pipe: Pipeline, device: torch.device
) -> tuple[TensorDict, TensorDict]:  # fmt: skip
    """Return the parameters and state of a checkpoint; without one, the initial ones.

    With `ema.validation` the parameters are the moving average; a note tells so, or that there is none.
    """
    if path is None:
        return pipe.init(recipe.init_seed, device), pipe.init_state(device)
    checkpoint = load(path, pipe, device=device, average=recipe.validates_average)
    if not recipe.validates_average:
        return checkpoint.params, checkpoint.state
    if checkpoint.average is None:
        note(f"ema.validation: {shown(path)} has no moving average; using its parameters")
        return checkpoint.params, checkpoint.state
    note("ema.validation: using the moving average of the weights")
    return in_place(checkpoint.average, checkpoint.params), checkpoint.state
