"""Find out whether a model's own loss shifts labels by one: then each row's first label has no effect, and its last has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc.captured import CapturedModel
from autofunc.checks.existing_model import Inputs, subject_of
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.whole_and_parts import labels_of
from autofunc.losses import IGNORED
from autofunc.model import Model


def shift_problem(subject: Subject) -> str:
    """Return C3's warning, found in a few runs; empty if the loss is not the model's own, or does not shift."""
    if subject.loss is not None:
        return ""
    try:
        losses = [subject.still[0].loss, *(_loss_of(subject, changed) for changed in _with_changed_labels(subject.batch))]
    except ForwardError:  # on a part; P3 reports it
        return ""
    made = [[loss] for loss in losses if loss is not None]
    return _warning(subject.batch) if len(made) == len(losses) and _only_the_last_matters(made) else ""


def shift_warning(model: Model, batch: Mapping[str, Any], inputs: Inputs = None) -> str:
    """Return C3's warning about a model, which is left unchanged; empty if it does not shift labels.

    Needs no weights if the model shifts labels before they meet any.

    Args:
        model: captured, or made of layers.
        batch: a small example, with at least two rows.
        inputs: see `af.from_module`.
    """
    if isinstance(model, CapturedModel):
        layers = list(model.layers)
        batches = (batch, *_with_changed_labels(batch))
        made = [_tensors(model.specialise(each).share(layers, each).values) for each in batches]
        if _only_the_last_matters(made):
            return _warning(batch)
    with subject_of(model, batch, None, inputs) as subject:
        return shift_problem(subject) if subject is not None else ""


def _warning(batch: Mapping[str, Any]) -> str:
    return (
        f"the model shifts {next(iter(_labels(batch)))!r} itself, so they must be as long as the tokens and unshifted; "
        "af.losses.causal_lm, and datasets made for it, use labels that are already shifted"
    )


def _labels(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the entries that hold several labels per row."""
    return {name: leaf for name, leaf in labels_of(batch).items() if leaf.dim() == 2 and leaf.shape[1] > 1}


def _with_changed_labels(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the batch with one label of the first column changed, and with one of the last; empty if impossible."""
    labels = _labels(batch)
    if len(labels) != 1:
        return []
    ((name, leaf),) = labels.items()
    changed = [_with_another(leaf, column) for column in (0, -1)]
    return [{**batch, name: each} for each in changed if each is not None]


def _only_the_last_matters(made: Sequence[Sequence[Tensor]]) -> bool:
    """Compare the results of a batch, and of both of `_with_changed_labels`."""
    if len(made) != 3:
        return False
    same, first, last = made
    return all(map(torch.equal, same, first)) and not all(map(torch.equal, same, last))


def _tensors(values: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in values.values() if isinstance(value, Tensor)]


def _with_another(labels: Tensor, column: int) -> Tensor | None:
    """Change one label in a column to another label; None if all labels are the same.

    Just one: exchanging labels between rows of the same tokens would leave a mean unchanged.
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
    """Return the mean loss without dropout; None if it cannot be computed."""
    try:
        return subject.run_still(batch).loss
    except ForwardError:  # the model may not accept these labels
        return None
