"""A run's output folder: checked before the start, and never shared with another run."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from autofunc.adapters import ADAPTER_FILES
from autofunc.errors import ConfigError
from autofunc.shown import quoted
from autofunc.train.step_folders import clear, steps_in

METRICS, PICTURE, PAGE = "metrics.jsonl", "loss.png", "run.html"
WEIGHTS, SCHEDULE = "model.safetensors", "schedule.csv"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
"""Subfolder with each process's log."""
TRACE = "nccl_trace_rank_"
"""Beginning of the names of NCCL's flight recorder dumps; the rank follows."""
TRACKERS = "trackers.json"
"""File with the run's name in experiment trackers, so that a resumed run continues there."""
ADAPTER = "adapter"
"""Subfolder with the trained adapter."""


def of_average(name: str) -> str:
    """Return the name used for the parameters' average: `model_ema.safetensors`.

    >>> of_average("model.safetensors"), of_average("adapter")
    ('model_ema.safetensors', 'adapter_ema')
    """
    stem = name.removesuffix(".safetensors")
    return f"{stem}_ema{name.removeprefix(stem)}"


_RESULTS = (
    METRICS, PICTURE, PAGE, WEIGHTS, of_average(WEIGHTS), SCHEDULE, TRACKERS,
    *(f"{folder}/{name}" for folder in (ADAPTER, of_average(ADAPTER)) for name in ADAPTER_FILES),
)  # fmt: skip


def default_output_dir(config_path: str | Path) -> Path:
    """Return runs/<name of the file>, with a number appended if that is taken: no run overwrites another."""
    return next(candidate for candidate in _candidates(config_path) if not candidate.exists())


def last_output_dir(config_path: str | Path) -> Path:
    """Return the newest of those folders that has checkpoints, or a new run's folder if none has."""
    taken = itertools.takewhile(Path.exists, _candidates(config_path))
    return next((each for each in reversed(list(taken)) if steps_in(each / CHECKPOINTS)), default_output_dir(config_path))


def _candidates(config_path: str | Path) -> Iterator[Path]:
    base = Path("runs") / Path(config_path).stem
    yield base
    yield from (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))


def make_output_dir(folder: Path, overwrite: bool, checkpoints: Path | None = None, *, goes_on: bool = False) -> None:
    """Create a run's folder, and check that it can be written to.

    Args:
        folder: of the run.
        overwrite: delete an earlier run's files.
        checkpoints: the run's folder of checkpoints; by default in `folder`.
        goes_on: resume the run in the folder.

    Raises:
        ConfigError: if the folder cannot be written to, or holds a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [folder / CHECKPOINTS] if checkpoints is None else [folder / CHECKPOINTS, checkpoints]
        if not goes_on:
            _make_empty(folder, kept, overwrite)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"output_dir: cannot write to {quoted(str(folder))}: {reason}") from error


def _make_empty(folder: Path, checkpoints: Sequence[Path], overwrite: bool) -> None:
    """Delete an earlier run's files, if allowed."""
    found = [name for name in _RESULTS if (folder / name).exists()]
    steps = [each for each in dict.fromkeys(checkpoints) if steps_in(each)]
    if (found or steps) and not overwrite:
        where = folder if found or not steps else steps[0]
        named = ", ".join([*found, *(each.name for each in steps)])
        raise ConfigError(
            f"output_dir: {where} already holds a run ({named}); choose another, or pass --overwrite to replace it"
            + (", or --checkpoint.restore_from LATEST to resume it" if steps else "")
        )
    logs = [each for name in ("rank_*.log", f"{TRACE}*") for each in (folder / LOGS).glob(name)] if overwrite else []
    for path in [*(folder / name for name in found), *logs]:
        path.unlink()
    for each in checkpoints:
        clear(each)
