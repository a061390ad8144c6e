"""Rows that pack several documents: a model must read positions to tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autofunc.batch import split_batch
from autofunc.data import STACKED, first_rows
from autofunc.errors import AutofuncError, ConfigError
from autofunc.losses import Loss
from autofunc.splitting import Stage, infer_boundaries
from autofunc.train.labels import inside

POSITIONS = "position_ids"
"""Batch entry that restarts at 0 with each document."""

HOW = (
    "models of transformers keep documents apart by position_ids; in your own, restrict attention to one document "
    "(positions restart at 0), or use rows of autofunc.data.TextFolder"
)


def is_packed(dataset: Any) -> bool:
    """Return whether a dataset's rows pack several documents, told apart by positions."""
    return any(getattr(each, "is_packed", None) is True for each in inside(dataset))


def check_positions_are_read(stages: Sequence[Stage], loss: Loss | None, where: str, dataset: Any) -> None:
    """Refuse a model that ignores positions, for packed rows: such a model runs on positions of any shape.

    Raises:
        ConfigError: if the model does not read positions.
    """
    if not is_packed(dataset):
        return
    batch = first_rows(dataset, 1)
    batch[POSITIONS] = batch[POSITIONS][:, :-1].repeat(1, 3)  # no model could add these to anything
    try:
        name = stages[0].model.key_name
        infer_boundaries(stages, {}, split_batch(batch, 1, batch_dims=STACKED, key_name=name)[0], loss)
    except AutofuncError:
        return
    raise ConfigError(f"{where} packs several documents into a row, and the model does not read {POSITIONS}: {HOW}")
