"""One process of an evaluation: the validation of a run, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from autofunc.checkpoint import load
from autofunc.checkpoint.write import is_first, of_first
from autofunc.config import FinetuneConfig
from autofunc.errors import ConfigError
from autofunc.pipe import Pipeline
from autofunc.shown import literal
from autofunc.train.loop import build_pipe
from autofunc.train.progress import ProgressReporter, Reporter, Silent
from autofunc.train.recipe import Recipe
from autofunc.train.resume import source, step_at
from autofunc.train.validation import Validated, Validation
from autofunc.train.watched import watched


def check_evaluation(recipe: Recipe) -> None:
    """Refuse an evaluation on nothing.

    Raises:
        ConfigError: without a validation dataset.
    """
    if recipe.validation_dataset is None:
        raise ConfigError("evaluate measures on validation_dataset, and there is none")


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
    console = Console(file=sys.stdout)
    path = of_first(source(config.checkpoint, output_dir))
    if is_shown and not as_json:
        console.print(literal(f"checkpoint: {path}, after step {step_at(path)}" if path is not None else "initial weights"))
    with watched(config.distributed):
        if not is_shown or as_json:
            found = _validated(recipe, mesh, device, path, Silent())
        else:
            with ProgressReporter(console, 0) as reporter:
                found = _validated(recipe, mesh, device, path, reporter)
    if is_shown:
        named = {} if found is None else found.named()
        if as_json:
            sys.stdout.write(
                json.dumps({"checkpoint": None if path is None else str(path), "step": step_at(path), **named})
            )
            sys.stdout.write("\n")
        else:
            console.print(literal(found.said() if found is not None else "no row of validation_dataset has a label"))


def _validated(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, path: Path | None, reporter: Reporter
) -> Validated | None:
    pipe = build_pipe(recipe, mesh)
    return Validation(recipe, pipe, device, reporter).run(*weights_of(path, recipe, pipe, device))


def weights_of(
    path: Path | None, recipe: Recipe, pipe: Pipeline, device: torch.device
) -> tuple[TensorDict, TensorDict]:  # fmt: skip
    """The parameters and the state of a checkpoint; without one those that training begins with."""
    if path is None:
        return pipe.init(recipe.init_seed, device), pipe.init_state(device)
    checkpoint = load(path, pipe, device=device)
    return checkpoint.params, checkpoint.state
