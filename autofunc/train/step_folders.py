"""The folder that the checkpoints of a run are in: one folder for each, called after its step, and links."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autofunc.checkpoint.folder import read_extra, remove
from autofunc.errors import CheckpointError

LATEST, LOWEST_VAL = "LATEST", "LOWEST_VAL"
"""Links among them."""

VALIDATION_LOSS = "validation_loss"
"""Of a checkpoint's `extra`."""

_NAME = re.compile(r"step_(\d+)(\.partial)?")


def name_of(step: int) -> str:
    """What the checkpoint after a step is called."""
    return f"step_{step}"


def link(name: Path, target: str) -> None:
    """Have a link lead to a folder beside it: to the one before, or to this one, whenever it is looked at."""
    new = name.with_name(f".{name.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(name)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    found = [step_of(entry) for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(step for step in found if step is not None)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its name; None for what no checkpoint of a run is called."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and not match[2] else None


def clear(folder: Path) -> None:
    """Delete the checkpoints in a folder: what an interrupted run has left of them, too."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if _NAME.fullmatch(entry.name):
            remove(entry.with_name(entry.name.removesuffix(".partial")))
        elif entry.name in (LATEST, LOWEST_VAL) and entry.is_symlink():
            entry.unlink()


def lowest(losses: Mapping[int, float]) -> int | None:
    """The step with the lowest loss, the first of several; None of none."""
    return min(losses, key=lambda step: (losses[step], step), default=None)


def validation_losses(folder: Path) -> dict[int, float]:
    """The validation losses of the checkpoints in a folder, by step; not of those that cannot be read."""
    losses = {}
    for step in steps_in(folder):
        try:
            loss = read_extra(folder / name_of(step)).get(VALIDATION_LOSS)
        except CheckpointError:
            continue  # whoever wants to go on from it is told
        if isinstance(loss, float):
            losses[step] = loss
    return losses
