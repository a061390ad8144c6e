"""Rows with several documents: a model that does not look at positions cannot tell them apart."""

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
"""The entry that begins at 0 with each document."""

HOW = (
    "models of transformers keep documents apart by position_ids; in one of your own let attention stay within a document "
    "(positions begin at 0 with each), or take rows of autofunc.data.TextFolder"
)


def is_packed(dataset: Any) -> bool:
    """Whether rows of a dataset hold several documents, told apart by their positions."""
    return any(getattr(each, "is_packed", None) is True for each in inside(dataset))


def check_positions_are_read(stages: Sequence[Stage], loss: Loss | None, where: str, dataset: Any) -> None:
    """Refuse a model for packed rows that does not look at positions: it runs on positions of any shape.

    Raises:
        ConfigError: saying so.
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
    raise ConfigError(f"{where} has several documents in a row, and the model does not read {POSITIONS}: {HOW}")
