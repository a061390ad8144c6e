"""One process of an evaluation: the validation of a run, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from autofunc.checkpoint import load
from autofunc.checkpoint.write import is_first, of_first
from autofunc.config import FinetuneConfig
from autofunc.errors import ConfigError
from autofunc.shown import literal
from autofunc.train.average import in_place
from autofunc.train.logs import line_console
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
    console = line_console()
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
    if path is None:
        params, state = pipe.init(recipe.init_seed, device), pipe.init_state(device)
    else:
        averaged = recipe.ema is not None and recipe.ema.validation
        checkpoint = load(path, pipe, device=device, average=averaged)
        params, state = checkpoint.params, checkpoint.state
        if checkpoint.average is not None:
            params = in_place(checkpoint.average, params)
    return Validation(recipe, pipe, device, reporter).run(params, state)
