"""Check that microbatches are weighted correctly in the loss, even if they have different numbers of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autofunc.checks.existing_model import Inputs, subject_of
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.whole_and_parts import LossKind, labels_of, loss_kind, run_whole_and_parts
from autofunc.losses import IGNORED, Loss
from autofunc.model import Model
from autofunc.whole_module import close


def weighting_warning(model: Model, batch: Mapping[str, Any], loss: Loss | None, inputs: Inputs = None) -> str:
    """Return C3's warning about the weights of microbatches if rows differ in their number of labels, else an empty text.

    The model is left unchanged.

    Args:
        model: captured, or made of layers.
        batch: a small example, with at least two rows.
        loss: see `af.pipeline`.
        inputs: see `af.from_module`.
    """
    counts = [(leaf != IGNORED).flatten(1).sum(1) for leaf in labels_of(batch).values() if leaf.dim() > 1]
    if all(bool((each == each[0]).all()) for each in counts):
        return ""
    with subject_of(model, batch, loss, inputs) as subject:
        return weighting_problem(subject) if subject is not None else ""


def weighting_problem(subject: Subject) -> str:
    """Explain why the mean over microbatches is not the batch's loss if label counts differ; empty if it is."""
    try:
        kind = loss_kind(run_whole_and_parts(subject))
    except ForwardError:  # P3 reports it
        return ""
    if kind == "equal":
        kind = _with_fewer_labels(subject)
    if kind == "tokens":
        return (
            "the loss is a mean over labels, but the mean over microbatches weights them all equally, however many labels "
            "they have: it is not the loss of the batch if these differ. Return (sum, number of labels) from a loss, as "
            "af.losses.causal_lm does"
        )
    if kind == "sum":
        return (
            "the loss is a sum over rows, and a step's loss is the mean over microbatches: it depends on how many there "
            "are. Return (sum, weight) from a loss, or a mean"
        )
    return ""


def _with_fewer_labels(subject: Subject) -> LossKind:
    """Return how the loss combines when one microbatch has only half of its labels."""
    for name, leaf in labels_of(subject.batch).items():
        if leaf.dim() < 2 or leaf.shape[0] != subject.rows:
            continue
        batch = {**subject.batch, name: _half(leaf)}
        try:
            both = run_whole_and_parts(subject, batch)
        except ForwardError:
            return "equal"  # the loss does not ignore labels of -100
        loss, plain = both.whole.loss, subject.still[0].loss
        if loss is None or plain is None or not bool(loss.isfinite()) or close(loss, plain):
            return "equal"
        return loss_kind(both)
    return "equal"


def _half(labels: Tensor) -> Tensor:
    """Return a copy of the labels with half of those in the first row that has several set to -100."""
    fewer = labels.clone()
    for row in fewer:
        counted = (row != IGNORED).nonzero()
        if len(counted) > 1:
            row[tuple(counted[len(counted) // 2 :].T)] = IGNORED
            break
    return fewer
