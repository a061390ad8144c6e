"""Whether microbatches weigh in the loss as they should, also where they have different numbers of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autofunc.checks.looked_at import Inputs, looked_at
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.whole_and_parts import LossKind, labels_of, loss_kind, run_whole_and_parts
from autofunc.losses import IGNORED, Loss
from autofunc.model import Model
from autofunc.whole_module import close


def weighed_alike_by(model: Model, batch: Mapping[str, Any], loss: Loss | None, inputs: Inputs = None) -> str:
    """What C3 says of a model and its loss, where rows differ in their number of labels; the model stays as it is.

    Args:
        model: captured, or of layers.
        batch: a small example, with at least two rows.
        loss: see `af.pipeline`.
        inputs: see `af.from_module`.
    """
    counts = [(leaf != IGNORED).flatten(1).sum(1) for leaf in labels_of(batch).values() if leaf.dim() > 1]
    if all(bool((each == each[0]).all()) for each in counts):
        return ""
    with looked_at(model, batch, loss, inputs) as subject:
        return weighs_alike(subject) if subject is not None else ""


def weighs_alike(subject: Subject) -> str:
    """Whether the mean over microbatches is the loss of the batch, also when these have different numbers of labels."""
    try:
        kind = loss_kind(run_whole_and_parts(subject))
    except ForwardError:  # P3 says so
        return ""
    if kind == "equal":
        kind = _with_fewer_labels(subject)
    if kind == "tokens":
        return (
            "the loss is a mean over labels, and the mean over microbatches weighs them all alike, however many labels "
            "they have: not the loss of the batch when these differ. Return (sum, number of labels) from a loss, as "
            "af.losses.causal_lm does"
        )
    if kind == "sum":
        return (
            "the loss is a sum over rows, and that of a step is the mean over microbatches: it depends on how many there "
            "are. Return (sum, weight) from a loss, or a mean"
        )
    return ""


def _with_fewer_labels(subject: Subject) -> LossKind:
    """What becomes of the loss when one microbatch has only half of its labels."""
    for name, leaf in labels_of(subject.batch).items():
        if leaf.dim() < 2 or leaf.shape[0] != subject.rows:
            continue
        batch = {**subject.batch, name: _half(leaf)}
        try:
            both = run_whole_and_parts(subject, batch)
        except ForwardError:
            return "equal"  # -100 is no label that it leaves out
        loss, plain = both.whole.loss, subject.still[0].loss
        if loss is None or plain is None or not bool(loss.isfinite()) or close(loss, plain):
            return "equal"
        return loss_kind(both)
    return "equal"


def _half(labels: Tensor) -> Tensor:
    """Labels of which those of the first row that counts any are half as many."""
    fewer = labels.clone()
    for row in fewer:
        counted = (row != IGNORED).nonzero()
        if len(counted) > 1:
            row[tuple(counted[len(counted) // 2 :].T)] = IGNORED
            break
    return fewer
