"""A check before training: labels must not be shifted by both the dataset and the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from autofunc.checks import shift_warning
from autofunc.config import FinetuneConfig
from autofunc.data import first_rows
from autofunc.errors import ConfigError
from autofunc.losses import IGNORED
from autofunc.model import Model

_ROWS = 4  # to look at


def refuse_shifted_twice(config: FinetuneConfig, model: Model, dataset: Any) -> None:
    """Refuse rows with aligned labels for a model whose loss shifts them again.

    Raises:
        ConfigError: naming both ways to fix it.
    """
    batch = first_rows(dataset, _ROWS)
    if not (aligned(batch) or any(getattr(each, "aligned_labels", False) for each in inside(dataset))):
        return
    if shift_warning(model, batch, config.inputs):
        name = " in ".join(type(each).__name__ for each in reversed(list(inside(dataset))[:2]))
        raise ConfigError(
            f"loss_fn: the model computes its own loss and shifts the labels itself, but {name} gives aligned labels. Let "
            "the dataset give the tokens themselves (datasets of autofunc.data: dataset.aligned_labels: false), or set "
            "loss_fn: {_target_: autofunc.losses.causal_lm}, which takes aligned labels"
        )


def inside(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and those it wraps, such as `torch.utils.data`'s Subset and ConcatDataset."""
    yield dataset
    held = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    for each in held:
        if hasattr(each, "__getitem__") and not isinstance(each, (str, dict)):
            yield from inside(each)


def aligned(batch: dict[str, Tensor]) -> bool:
    """Return whether each label is the token after its position, judging by the batch's rows."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    counted = labels[:, :-1] != IGNORED
    following = labels[:, :-1][counted] == ids[:, 1:][counted]
    same = labels[:, :-1][counted] == ids[:, :-1][counted]
    return bool(counted.any() and following.all() and not same.all())
