"""C3: there is a loss, a differentiable scalar, and microbatches are weighted correctly in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from autofunc.checks.label_counts import weighting_problem
from autofunc.checks.shifted_labels import shift_problem
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Status, Verdict
from autofunc.checks.whole_and_parts import labels_of
from autofunc.losses import IGNORED, evaluate


def check_loss(subject: Subject) -> list[Verdict]:
    """Return the findings of C3."""

    def verdict(status: Status, message: str) -> Verdict:
        return Verdict("C3", status, message, subject.where)

    first = subject.first
    if first.error:
        return [verdict("fail", f"forward does not run on this batch: {first.error}")]
    kind = _kind(first.outputs)
    try:
        terms = evaluate(subject.loss, first.outputs, subject.batch)
    except Exception as error:  # the user's loss may raise anything
        hint = _missing_labels(subject) if subject.loss is None else ""
        return [verdict("fail", f"forward returns {kind}: {error}{hint}")]
    if not bool(terms.sum.isfinite()):
        return [verdict("fail", f"the loss is {float(terms.sum)}; look for a division by zero, or rows without labels")]
    if not terms.sum.requires_grad:
        return [verdict("fail", "the loss has no gradient: forward detaches it, or no parameter requires one")]
    shifts, weighting = shift_problem(subject), weighting_problem(subject)
    found = [verdict("pass" if _labels_are_tokens(subject.batch) else "warn", shifts)] if shifts else []
    found += [verdict("warn", weighting)] if weighting else []
    source = "the given loss is a scalar" if subject.loss is not None else f"forward returns {kind} with a scalar loss"
    return found or [Verdict("C3", "pass", f"{source} that has a gradient")]


def _kind(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}" if outputs.dim() else "a scalar"
    if isinstance(outputs, Mapping) or is_dataclass(outputs):
        names = list(outputs) if isinstance(outputs, Mapping) else list(vars(outputs))
        return f"{type(outputs).__name__} ({', '.join(map(str, names[:5]))})"
    return f"a {type(outputs).__name__}"


def _missing_labels(subject: Subject) -> str:
    """Say so if forward takes labels that the batch lacks: with them the module would compute its own loss."""
    if subject.module is None:
        return ""
    names = [name for name in ("labels", "label", "targets", "target") if name in subject.arguments]
    return f". Forward takes {names[0]!r}, which the batch does not have" if names and names[0] not in subject.batch else ""


def _labels_are_tokens(batch: Mapping[str, Any]) -> bool:
    """Return whether labels equal another entry place by place: unshifted, as a model that shifts them needs them."""
    for name, labels in labels_of(batch).items():
        counted = labels != IGNORED
        others = (leaf for other, leaf in batch.items() if other != name and isinstance(leaf, Tensor))
        if any(leaf.shape == labels.shape and torch.equal(leaf[counted], labels[counted]) for leaf in others):
            return True
    return False
