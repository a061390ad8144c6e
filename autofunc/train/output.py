"""The folder that a run writes into: found unfit before the start, and never one that holds another run."""

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
"""The folder in it with what each process wrote to its output."""
TRACE = "nccl_trace_rank_"
"""What the files of NCCL's flight recorder are called there, before the rank."""
TRACKERS = "trackers.json"
"""What other tools call the run, so that it goes on there too."""
ADAPTER = "adapter"
"""The folder in it with the adapter that a run trained."""


def of_average(name: str) -> str:
    """What the same is called of the average of parameters: `model_ema.safetensors`.

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
    """runs/<name of the file>, or with a number after it where that is taken: no run overwrites another."""
    return next(candidate for candidate in _candidates(config_path) if not candidate.exists())


def last_output_dir(config_path: str | Path) -> Path:
    """The newest of those folders that has checkpoints; the one of a new run where none has."""
    taken = itertools.takewhile(Path.exists, _candidates(config_path))
    return next((each for each in reversed(list(taken)) if steps_in(each / CHECKPOINTS)), default_output_dir(config_path))


def _candidates(config_path: str | Path) -> Iterator[Path]:
    base = Path("runs") / Path(config_path).stem
    yield base
    yield from (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))


def make_output_dir(folder: Path, overwrite: bool, checkpoints: Path | None = None, *, goes_on: bool = False) -> None:
    """Make a folder for a run, and try to write into it.

    Args:
        folder: which.
        overwrite: whether what another run has left there is deleted.
        checkpoints: the run's folder of checkpoints; by default in `folder`.
        goes_on: whether the run goes on from what is there.

    Raises:
        ConfigError: when it cannot be written into, or holds a run.
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
        raise ConfigError(f"output_dir: {quoted(str(folder))} cannot be written into: {reason}") from error


def _make_empty(folder: Path, checkpoints: Sequence[Path], overwrite: bool) -> None:
    """Delete what a run has left, if that may be."""
    found = [name for name in _RESULTS if (folder / name).exists()]
    steps = [each for each in dict.fromkeys(checkpoints) if steps_in(each)]
    if (found or steps) and not overwrite:
        where = folder if found or not steps else steps[0]
        named = ", ".join([*found, *(each.name for each in steps)])
        raise ConfigError(
            f"output_dir: {where} holds a run already ({named}); name another one, or say --overwrite to replace it"
            + (", or --checkpoint.restore_from LATEST to go on with it" if steps else "")
        )
    logs = [each for name in ("rank_*.log", f"{TRACE}*") for each in (folder / LOGS).glob(name)] if overwrite else []
    for path in [*(folder / name for name in found), *logs]:
        path.unlink()
    for each in checkpoints:
        clear(each)
