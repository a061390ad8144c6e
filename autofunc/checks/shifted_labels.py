"""Whether a model's own loss shifts labels by one: then the first of each row makes no difference, and the last does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc.captured import CapturedModel
from autofunc.checks.looked_at import Inputs, looked_at
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.whole_and_parts import labels_of
from autofunc.losses import IGNORED
from autofunc.model import Model


def shifts_labels(subject: Subject) -> str:
    """What C3 says of it, seen in a few runs; empty where the loss is not the model's own, or does not shift."""
    if subject.loss is not None:
        return ""
    try:
        losses = [subject.still[0].loss, *(_loss_of(subject, changed) for changed in _with_others(subject.batch))]
    except ForwardError:  # of a part; P3 says so
        return ""
    made = [[loss] for loss in losses if loss is not None]
    return _said(subject.batch) if len(made) == len(losses) and _only_the_last_matters(made) else ""


def shifted_by(model: Model, batch: Mapping[str, Any], inputs: Inputs = None) -> str:
    """What C3 says of a model; it stays as it is. Weights are not needed where labels are shifted before they meet any.

    Args:
        model: captured, or of layers.
        batch: a small example, with at least two rows.
        inputs: see `af.from_module`.
    """
    if isinstance(model, CapturedModel):
        layers = list(model.layers)
        made = [_tensors(model.specialise(each).share(layers, each).values) for each in (batch, *_with_others(batch))]
        if _only_the_last_matters(made):
            return _said(batch)
    with looked_at(model, batch, None, inputs) as subject:
        return shifts_labels(subject) if subject is not None else ""


def _said(batch: Mapping[str, Any]) -> str:
    return (
        f"the model shifts {next(iter(_labels(batch)))!r} itself, so they must be as long as the tokens and not shifted; "
        "af.losses.causal_lm, and data made for it, has labels that are shifted already"
    )


def _labels(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of labels of which each row has several."""
    return {name: leaf for name, leaf in labels_of(batch).items() if leaf.dim() == 2 and leaf.shape[1] > 1}


def _with_others(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The batch with another label in the first column, and with one in the last; none where that cannot be."""
    labels = _labels(batch)
    if len(labels) != 1:
        return []
    ((name, leaf),) = labels.items()
    changed = [_with_another(leaf, column) for column in (0, -1)]
    return [{**batch, name: each} for each in changed if each is not None]


def _only_the_last_matters(made: Sequence[Sequence[Tensor]]) -> bool:
    """Of what was made of a batch, and then of each of `_with_others`."""
    if len(made) != 3:
        return False
    same, first, last = made
    return all(map(torch.equal, same, first)) and not all(map(torch.equal, same, last))


def _tensors(values: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in values.values() if isinstance(value, Tensor)]


def _with_another(labels: Tensor, column: int) -> Tensor | None:
    """Labels of which one in a column is another; None where there is no other.

    One only: labels that change places between rows of the same tokens leave a mean as it is.
    """
    counted = (labels[:, column] != IGNORED).nonzero()
    if not len(counted):
        return None
    row = int(counted[0])
    others = labels[(labels != labels[row, column]) & (labels != IGNORED)]
    if not len(others):
        return None
    changed = labels.clone()
    changed[row, column] = others[0]
    return changed


def _loss_of(subject: Subject, batch: Mapping[str, Any]) -> Tensor | None:
    """The mean loss without dropout; None where it cannot be computed."""
    try:
        return subject.run_still(batch).loss
    except ForwardError:  # these labels may not be labels it knows
        return None
