"""The start of a run: fresh, or from a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autofunc.checkpoint import check_fits, load, read_extra
from autofunc.config.schema import CheckpointSection
from autofunc.data import START, Position
from autofunc.errors import CheckpointError, ConfigError
from autofunc.pipe import Pipeline
from autofunc.shown import quoted, shown
from autofunc.train.average import begun
from autofunc.train.early_stopping import Patience
from autofunc.train.output import CHECKPOINTS
from autofunc.train.recipe import Recipe
from autofunc.train.role import restarts
from autofunc.train.step import Trained
from autofunc.train.step_folders import LATEST, LOWEST_VAL, lowest, name_of, step_of, steps_in, validation_losses

AUTO = "AUTO"
_BEST, _SINCE = "best_validation_loss", "validations_since_best"


@dataclass(frozen=True)
class Beginning:
    """The state a run starts from."""

    trained: Trained
    step: int  # last finished step
    position: Position  # in the data
    patience: Patience
    notes: tuple[str, ...] = ()  # for the user


def fresh(recipe: Recipe, pipe: Pipeline, device: torch.device) -> Beginning:
    """Return the start of a fresh run."""
    params = pipe.init(recipe.init_seed, device)
    average = begun(recipe.model, params) if recipe.ema is not None else None
    trained = Trained(params, pipe.init_state(device), recipe.optimizer.init(params), average)
    return Beginning(trained, 0, START, Patience())


def restored(path: Path, recipe: Recipe, pipe: Pipeline, device: torch.device) -> Beginning:
    """Return the start of a run that resumes from a checkpoint.

    Raises:
        CheckpointError: if it cannot be read or does not fit.
    """
    checkpoint = load(path, pipe, optimizer=recipe.optimizer, device=device, average=recipe.ema is not None)
    assert checkpoint.optimizer_state is not None, "an optimizer was given"
    step, position = _place(path, checkpoint.extra, recipe)
    average, notes = checkpoint.average, []
    if recipe.ema is not None and average is None:
        average = begun(recipe.model, checkpoint.params)
        notes = [f"ema: {shown(path)} has no average; starting one from the parameters of step {step}"]
    trained = Trained(checkpoint.params, checkpoint.state, checkpoint.optimizer_state, average)
    best, since = checkpoint.extra.get(_BEST), checkpoint.extra.get(_SINCE)
    patience = Patience(float(best), int(since)) if best is not None and since is not None else Patience()
    return Beginning(trained, step, position, patience, tuple(notes))


def extra_of(recipe: Recipe, step: int, position: Position, patience: Patience) -> dict[str, Any]:
    """Return a checkpoint's extra values, which `restored` reads."""
    known = {} if math.isinf(patience.best) else {_BEST: patience.best, _SINCE: patience.since}
    return _of_run(recipe, step, position) | known


def _of_run(recipe: Recipe, step: int, position: Position) -> dict[str, int]:
    return {
        "step": step,
        "epoch": position.epoch,
        "rows": position.rows,
        "seed": recipe.seed,
        "dataset_rows": len(recipe.dataset),
    }


def check_restorable(path: Path, recipe: Recipe) -> None:
    """Refuse a checkpoint that the run cannot resume from, before processes start.

    Raises:
        ConfigError: describing the difference.
    """
    try:
        step, _ = _place(path, check_fits(path, recipe.model), recipe)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.restore_from: {error}") from error
    if step > recipe.num_steps:
        raise ConfigError(
            f"checkpoint.restore_from: {shown(path)} is from step {step}, but the run ends after {recipe.num_steps}: raise "
            "step_scheduler.max_steps or num_epochs"
        )


def step_at(path: Path | None) -> int:
    """Return the step of the checkpoint to resume from; 0 for a fresh run."""
    return 0 if path is None else int(read_extra(path).get("step", 0))


def _place(path: Path, extra: dict[str, Any], recipe: Recipe) -> tuple[int, Position]:
    """Return (step, position in the data) of a checkpoint."""
    mine = _of_run(recipe, 0, START)
    numbers = {name: extra.get(name) for name in mine}
    if not all(isinstance(number, int) and number >= 0 for number in numbers.values()):
        raise CheckpointError(
            f"{shown(path)} is not a checkpoint of a run: its extra has no {' and '.join(mine)}; load it with af.load"
        )
    for name, key in (("seed", "seed"), ("dataset_rows", "the rows of dataset")):
        if numbers[name] != mine[name]:
            raise CheckpointError(
                f"{shown(path)} is from a run with other data: {key} {numbers[name]} there, {mine[name]} here, so the "
                "order of rows differs. To start over with its weights, set weights: its model.safetensors"
            )
    step, epoch, rows = extra["step"], extra["epoch"], extra["rows"]
    if epoch < 1 or rows > mine["dataset_rows"]:
        raise CheckpointError(f"{shown(path)} is damaged: epoch {epoch}, row {rows} of {mine['dataset_rows']}")
    return step, Position(epoch, rows)


def folder_of(config: CheckpointSection | None, output_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    named = config.checkpoint_dir if config is not None else None
    return Path(named).expanduser() if named is not None else output_dir / CHECKPOINTS


def wanted(config: CheckpointSection | None) -> str | None:
    """Return LATEST, LOWEST_VAL or AUTO for a run that resumes in its own folder; else None."""
    name = ((config.restore_from if config is not None else None) or "").upper()
    return name if name in (LATEST, LOWEST_VAL, AUTO) else None


def source(config: CheckpointSection | None, output_dir: Path, *, writes: bool = True) -> Path | None:
    """Return the checkpoint to resume from; None for a fresh run.

    A run that torch's launcher restarted after a failure resumes from its latest checkpoint, if it has one.

    Args:
        config: section `checkpoint`.
        output_dir: of the run.
        writes: the run writes newer checkpoints; an evaluation does not.

    Raises:
        ConfigError: if there is no such checkpoint, or the run would overwrite newer ones.
    """
    if config is None:
        return None
    folder, name = folder_of(config, output_dir), wanted(config)
    there = steps_in(folder)
    if there and writes and restarts():
        name = LATEST
    if name is None:
        path = Path(config.restore_from).expanduser() if config.restore_from is not None else None
    elif name == LOWEST_VAL:
        path = _lowest(folder)
    elif there:
        path = folder / name_of(there[-1])
    elif name == AUTO:
        path = None
    else:
        raise ConfigError(
            f"checkpoint.restore_from: LATEST of {quoted(str(folder))}: it has no checkpoint; AUTO would start a fresh run"
        )
    if path is not None and writes and config.enabled and goes_on_in(folder, path):
        after = [step for step in there if step > (step_of(path) or 0)]
        if after:
            raise ConfigError(
                f"checkpoint.restore_from: {quoted(str(path))} is not the latest in its folder, and the run would "
                f"overwrite {name_of(after[0])}; name another output_dir, and restore_from: {path}"
            )
    return path


def goes_on_in(folder: Path, path: Path | None) -> bool:
    """Return whether a checkpoint lies in the folder that the run adds to."""
    return path is not None and path.parent.resolve() == folder.resolve() and step_of(path) is not None


def _lowest(folder: Path) -> Path:
    step = lowest(validation_losses(folder))
    if step is None:
        why = "none of its checkpoints has a validation loss" if steps_in(folder) else "it has no checkpoint"
        raise ConfigError(f"checkpoint.restore_from: LOWEST_VAL of {quoted(str(folder))}: {why}")
    return folder / name_of(step)
