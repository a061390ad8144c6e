"""`autofunc export`: write trained weights as a folder that `from_pretrained` loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from autofunc.automodel import write_pretrained
from autofunc.config import read_config
from autofunc.progress_bar import CONSOLE
from autofunc.shown import literal, shown
from autofunc.train.adapters import trained_model
from autofunc.train.datasets import read_dataset
from autofunc.train.model import SEED, build_base, make


def export(config_path: str, overrides: Sequence[str], weights: str, folder: str) -> None:
    """Write a folder that transformers loads.

    Args:
        config_path: the YAML file of the run.
        overrides: see `config.load_config`.
        weights: the run's output folder, or its model.safetensors; with `peft`, the run's output folder or its adapter,
            which is merged into the weights of the base.
        folder: the folder to write.

    Raises:
        AutofuncError: if the model cannot be exported, or the weights do not fit it.
    """
    with CONSOLE.status(literal(f"writing {shown(folder)}")):
        config, _ = read_config(config_path, overrides)
        if config.peft is None:
            made = make(config.model_copy(update={"weights": SEED}))
            written = write_pretrained(made, Path(weights), folder)
        else:
            base = build_base(config, read_dataset(config.dataset, "dataset", config.dataloader))
            model = trained_model(base, Path(weights).expanduser())
            written = write_pretrained(model, model.init(config.seed if model.uses_seed else None), folder)
    sys.stdout.write(f"written to {shown(written)}\n")
