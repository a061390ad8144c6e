"""C3: there is a loss, a scalar that can be learnt from, and microbatches weigh in it as they should."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.checks.seeds import seeded
from autofunc.checks.subject import ForwardError, Subject
from autofunc.checks.verdict import Status, Verdict
from autofunc.checks.whole_and_parts import LossKind, labels_of, loss_kind, run_whole_and_parts
from autofunc.losses import IGNORED, evaluate
from autofunc.model import Model
from autofunc.whole_module import close


def check_loss(subject: Subject) -> list[Verdict]:
    """The findings of C3: one verdict or more."""

    def verdict(status: Status, message: str) -> Verdict:
        return Verdict("C3", status, message, subject.where)

    first = subject.first
    if first.error:
        return [verdict("fail", f"forward does not run on this batch: {first.error}")]
    kind = _kind(first.outputs)
    try:
        terms = evaluate(subject.loss, first.outputs, subject.batch)
    except Exception as error:  # the user's loss may raise anything
        wanted = _labels_wanted(subject) if subject.loss is None else ""
        return [verdict("fail", f"forward returns {kind}: {error}{wanted}")]
    if not bool(terms.sum.isfinite()):
        return [verdict("fail", f"the loss is {float(terms.sum)}; look for a division by zero, or rows without labels")]
    if not terms.sum.requires_grad:
        return [verdict("fail", "the loss has no gradient: forward detaches it, or no parameter requires one")]
    shifts, weighs = _shifts(subject), _weighs(subject)
    found = [verdict("pass" if _labels_are_tokens(subject.batch) else "warn", shifts)] if shifts else []
    found += [verdict("warn", weighs)] if weighs else []
    source = "the given loss is a scalar" if subject.loss is not None else f"forward returns {kind} with a scalar loss"
    return found or [Verdict("C3", "pass", f"{source} that has a gradient")]


def shifted_by(
    checked: nn.Module | Model, batch: Mapping[str, Any], inputs: Sequence[str] | Mapping[str, str] | None = None
) -> str:
    """What C3 says where a model's own loss shifts labels by one; empty where it does not. The model stays as it is.

    Args:
        checked: with real weights.
        batch: a small example, with at least two rows.
        inputs: see `af.from_module`.
    """
    subject = Subject(checked, batch, None, inputs, None)
    _ = subject.snapshot  # before anything runs
    try:
        with seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of running it otherwise than it is used to
            return "" if subject.first.error else _shifts(subject)
    finally:
        subject.restore()


def _kind(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}" if outputs.dim() else "a scalar"
    if isinstance(outputs, Mapping) or is_dataclass(outputs):
        names = list(outputs) if isinstance(outputs, Mapping) else list(vars(outputs))
        return f"{type(outputs).__name__} ({', '.join(map(str, names[:5]))})"
    return f"a {type(outputs).__name__}"


def _labels_wanted(subject: Subject) -> str:
    """A module that would make its loss itself, given labels."""
    if subject.module is None:
        return ""
    names = [name for name in ("labels", "label", "targets", "target") if name in subject.arguments]
    return f". Forward takes {names[0]!r}, which the batch does not have" if names and names[0] not in subject.batch else ""


def _shifts(subject: Subject) -> str:
    """Whether the forward shifts the labels: then the first of each row makes no difference, and the last does."""
    labels = {name: leaf for name, leaf in labels_of(subject.batch).items() if leaf.dim() == 2 and leaf.shape[1] > 1}
    if subject.loss is not None or len(labels) != 1:
        return ""
    name, leaf = next(iter(labels.items()))
    try:
        losses = [subject.still[0].loss]
    except ForwardError:  # of a part; P3 says so
        return ""
    for column in (0, -1):
        changed = _with_another(leaf, column)
        if changed is None:
            return ""
        losses.append(_loss_of(subject, {**subject.batch, name: changed}))
    if any(loss is None for loss in losses):
        return ""
    same, first, last = (loss for loss in losses if loss is not None)
    if not torch.equal(same, first) or torch.equal(same, last):
        return ""
    return (
        f"the model shifts {name!r} itself, so they must be as long as the tokens and not shifted; af.losses.causal_lm, "
        "and data made for it, has labels that are shifted already"
    )


def _labels_are_tokens(batch: Mapping[str, Any]) -> bool:
    """Whether labels are what another entry is, place by place: not shifted, as a model that shifts them needs them."""
    for name, labels in labels_of(batch).items():
        counted = labels != IGNORED
        others = (leaf for other, leaf in batch.items() if other != name and isinstance(leaf, Tensor))
        if any(leaf.shape == labels.shape and torch.equal(leaf[counted], labels[counted]) for leaf in others):
            return True
    return False


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


def _weighs(subject: Subject) -> str:
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
        fewer = leaf.clone()
        fewer[0, ..., leaf.shape[-1] // 2 :] = IGNORED
        batch = {**subject.batch, name: fewer}
        try:
            both = run_whole_and_parts(subject, batch)
        except ForwardError:
            return "equal"  # -100 is no label that it leaves out
        loss, plain = both.whole.loss, subject.still[0].loss
        if loss is None or plain is None or not bool(loss.isfinite()) or close(loss, plain):
            return "equal"
        return loss_kind(both)
    return "equal"
