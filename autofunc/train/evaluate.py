"""One process of an evaluation: the validation of a run, without training."""

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
    """What an evaluation needs of a configuration: what is only learnt from is not read.

    Raises:
        ConfigError: without a validation dataset.
    """
    if config.leading_validation is None:
        raise ConfigError("evaluate measures on validation_dataset, and there is none")
    return config.model_copy(update={"dataset": config.validations[config.leading_validation]})


def check_evaluation(recipe: Recipe, path: Path | None) -> None:
    """Refuse a checkpoint of another model, before processes start.

    Raises:
        ConfigError: saying what differs.
    """
    if path is not None:
        try:
            check_fits(path, recipe.model)
        except CheckpointError as error:
            raise ConfigError(f"checkpoint.restore_from: {error}") from error


def evaluate(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, output_dir: Path, config: FinetuneConfig, as_json: bool
) -> None:
    """Measure a checkpoint, or the weights that the configuration names; the first rank shows what came of it.

    Args:
        recipe: of the run.
        mesh: this process's mesh; None runs every pp rank in this process.
        device: where parameters and batches live.
        output_dir: of the run, for its checkpoints.
        config: for the checkpoint, and the timeouts.
        as_json: whether it is shown as JSON.
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
            console.print(literal(found.said() if found is not None else f"no row of {names} has a label"))


def _which(path: Path | None, config: FinetuneConfig) -> str:
    """What is measured."""
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
    """The parameters and the state of a checkpoint; without one those that training begins with.

    With `ema.validation` the parameters are the moving average, which is said, and also where there is none.
    """
    if path is None:
        return pipe.init(recipe.init_seed, device), pipe.init_state(device)
    checkpoint = load(path, pipe, device=device, average=recipe.validates_average)
    if not recipe.validates_average:
        return checkpoint.params, checkpoint.state
    if checkpoint.average is None:
        note(f"ema.validation: {shown(path)} has no moving average, so these are its parameters")
        return checkpoint.params, checkpoint.state
    note("ema.validation: the weights are the moving average")
    return in_place(checkpoint.average, checkpoint.params), checkpoint.state
