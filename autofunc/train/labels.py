"""Labels that are shifted twice, once by the dataset and once by the model: found before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from autofunc.checks import shifted_by
from autofunc.config import FinetuneConfig
from autofunc.data import first_rows
from autofunc.errors import ConfigError
from autofunc.losses import IGNORED
from autofunc.model import Model

_ROWS = 4  # looked at


def refuse_shifted_twice(config: FinetuneConfig, model: Model, dataset: Any) -> None:
    """Refuse a model whose own loss shifts labels, on rows whose labels are aligned already.

    Raises:
        ConfigError: saying which of the two to change.
    """
    batch = first_rows(dataset, _ROWS)
    if not (aligned(batch) or any(getattr(each, "aligned_labels", False) for each in inside(dataset))):
        return
    if shifted_by(model, batch, config.inputs):
        name = " in ".join(type(each).__name__ for each in reversed(list(inside(dataset))[:2]))
        raise ConfigError(
            f"loss_fn: the model's own loss shifts labels by one, and {name} gives labels that are aligned already. Let it "
            "give the tokens themselves (of datasets of autofunc.data: dataset.aligned_labels: false); or set loss_fn: "
            "{_target_: autofunc.losses.causal_lm}, which takes aligned ones"
        )


def inside(dataset: Any) -> Iterator[Any]:
    """A dataset, and those that it is made of: as `torch.utils.data`'s Subset and ConcatDataset are."""
    yield dataset
    held = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    for each in held:
        if hasattr(each, "__getitem__") and not isinstance(each, (str, dict)):
            yield from inside(each)


def aligned(batch: dict[str, Tensor]) -> bool:
    """Whether each label is the token after the one in its place, as far as rows tell."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    counted = labels[:, :-1] != IGNORED
    following = labels[:, :-1][counted] == ids[:, 1:][counted]
    same = labels[:, :-1][counted] == ids[:, :-1][counted]
    return bool(counted.any() and following.all() and not same.all())
