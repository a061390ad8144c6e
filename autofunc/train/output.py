"""The folder that a run writes into: found unfit before the start, and never one that holds another run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from autofunc.adapters import ADAPTER_FILES
from autofunc.errors import ConfigError
from autofunc.shown import quoted

METRICS, PICTURE, WEIGHTS, SCHEDULE = "metrics.jsonl", "loss.png", "model.safetensors", "schedule.csv"
ADAPTER = "adapter"
"""The folder in it with the adapter that a run trained."""
_RESULTS = (METRICS, PICTURE, WEIGHTS, SCHEDULE, *(f"{ADAPTER}/{name}" for name in ADAPTER_FILES))


def default_output_dir(config_path: str | Path) -> Path:
    """runs/<name of the file>, or with a number after it where that is taken: no run overwrites another."""
    base = Path("runs") / Path(config_path).stem
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def make_output_dir(folder: Path, overwrite: bool) -> None:
    """Make a folder for a run, and try to write into it.

    Args:
        folder: which.
        overwrite: whether what another run has left there is deleted.

    Raises:
        ConfigError: when it cannot be written into, or holds a run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = [name for name in _RESULTS if (folder / name).exists()]
        if found and not overwrite:
            raise ConfigError(
                f"output_dir: {folder} holds a run already ({', '.join(found)}); name another one, or say --overwrite to "
                "replace it"
            )
        for name in found:
            (folder / name).unlink()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"output_dir: {quoted(str(folder))} cannot be written into: {reason}") from error
