"""`autofunc export`: trained weights as a folder that `from_pretrained` loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from autofunc.automodel import write_pretrained
from autofunc.config import read_config
from autofunc.shown import literal, shown
from autofunc.train.model import SEED, make


def export(config_path: str, overrides: Sequence[str], weights: str, folder: str) -> None:
    """Write the folder.

    Args:
        config_path: the YAML file of the run.
        overrides: see `config.load_config`.
        weights: the run's output folder, or its model.safetensors.
        folder: what is written.

    Raises:
        AutofuncError: when the model has no form on disk, or the weights do not fit it.
    """
    with Console(stderr=True).status(literal(f"writing {shown(folder)}")):
        config, _ = read_config(config_path, overrides)
        made = make(config.model_copy(update={"weights": SEED}))
        written = write_pretrained(made, Path(weights), folder)
    sys.stdout.write(f"written to {shown(written)}\n")
