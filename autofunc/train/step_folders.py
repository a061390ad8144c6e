"""The folder of a run's checkpoints: one subfolder per checkpoint, named after its step, and links."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autofunc.checkpoint.folder import read_extra, remove
from autofunc.errors import CheckpointError

LATEST, LOWEST_VAL = "LATEST", "LOWEST_VAL"
"""Names of the links."""

VALIDATION_LOSS = "validation_loss"
"""Keys in a checkpoint's `extra`."""

_NAME = re.compile(r"step_(\d+)(\.partial)?")


def name_of(step: int) -> str:
    """Return the name of the checkpoint after a step."""
    return f"step_{step}"


def link(name: Path, target: str) -> None:
    """Point a link at a folder beside it, atomically."""
    new = name.with_name(f".{name.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(name)


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order."""
    found = [step_of(entry) for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(step for step in found if step is not None)


def step_of(path: Path) -> int | None:
    """Return a checkpoint's step, given its name; None if the name is not one of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and not match[2] else None


def clear(folder: Path) -> None:
    """Delete the checkpoints in a folder, including incomplete ones of interrupted runs."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if _NAME.fullmatch(entry.name):
            remove(entry.with_name(entry.name.removesuffix(".partial")))
        elif entry.name in (LATEST, LOWEST_VAL) and entry.is_symlink():
            entry.unlink()


def lowest(losses: Mapping[int, float]) -> int | None:
    """Return the step with the lowest loss, the first of several; None if there is none."""
    return min(losses, key=lambda step: (losses[step], step), default=None)


def validation_losses(folder: Path) -> dict[int, float]:
    """Return the validation losses of the checkpoints in a folder, by step, skipping unreadable ones."""
    losses = {}
    for step in steps_in(folder):
        try:
            loss = read_extra(folder / name_of(step)).get(VALIDATION_LOSS)
        except CheckpointError:
            continue  # resuming from it reports the error
        if isinstance(loss, float):
            losses[step] = loss
    return losses
