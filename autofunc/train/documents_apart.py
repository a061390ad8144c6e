"""A check at the start of a run: packed documents must not see each other. It uses the run's weights and layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc.data import first_rows
from autofunc.errors import PipelineRunError
from autofunc.losses import IGNORED
from autofunc.pipe import Pipeline
from autofunc.runtime.plan import Mode
from autofunc.train.batches import to_device
from autofunc.train.packed import HOW, POSITIONS, is_packed
from autofunc.train.recipe import Recipe
from autofunc.train.weighing import counting_all

_CLOSE, _CLOSE_IN_BFLOAT16 = 1e-4, 2e-2  # masked tokens add zero, but may change the order in which a router sorts
_MOST_ROWS = 1000  # to search for one with two documents


def check_documents_apart(
    recipe: Recipe, pipe: Pipeline, params: TensorDict, state: TensorDict, device: torch.device
) -> None:  # fmt: skip
    """Refuse a model in which one document changes the loss of the next. All processes call it.

    Args:
        recipe: of the run.
        pipe: of the run.
        params: of this rank.
        state: of this rank.
        device: of the batches.

    Raises:
        PipelineRunError: if documents see each other.
    """
    datasets = {"dataset": recipe.dataset, **recipe.validation_datasets}
    where = next((name for name, dataset in datasets.items() if is_packed(dataset)), None)
    row = _with_several(datasets[where]) if where is not None else None
    if row is None:
        return
    behind = _documents(row) > 1
    ids = row["input_ids"]
    first_behind = int(((row["labels"] != IGNORED) & behind).nonzero()[0, -1])  # the label closest to the other document
    alone = torch.arange(ids.shape[-1]) == first_behind
    row = {**row, "labels": row["labels"].masked_fill(~alone, IGNORED)}
    other = {**row, "input_ids": torch.where(behind, ids, ids.amax() - ids)}
    rows = recipe.rows // recipe.axes.dp

    def loss_of(row: Mapping[str, Tensor]) -> float:
        batch = counting_all({name: leaf.repeat_interleave(rows, 0) for name, leaf in row.items()})
        result = pipe.run(Mode.LOSS, params, to_device(batch, device), None, state)
        assert result.loss is not None, "the last stage ends in a loss"
        return result.loss.item()

    first, second = loss_of(row), loss_of(other)
    close = _CLOSE_IN_BFLOAT16 if recipe.sharding.mp_policy.param_dtype is torch.bfloat16 else _CLOSE
    if abs(first - second) > close * abs(first):
        raise PipelineRunError(
            f"{where} packs several documents into a row, and the model lets them see each other: changing the first one "
            f"moves the loss of the next from {first:.6f} to {second:.6f}; {HOW}"
        )


def _with_several(dataset: Any) -> dict[str, Tensor] | None:
    """Return the first row with labels behind its first document; None if there is none."""
    for index in range(min(len(dataset), _MOST_ROWS)):
        row = first_rows(dataset, 1, index)
        if ((row["labels"] != IGNORED) & (_documents(row) > 1)).any():
            return row
    return None


def _documents(row: Mapping[str, Tensor]) -> Tensor:
    """Number each token's document, from 1."""
    return (row[POSITIONS] == 0).cumsum(-1)
