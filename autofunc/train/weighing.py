"""Combine the parts of a batch, each weighted by its counting rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc.batch import COUNTS
from autofunc.runtime.step import StepResult
from autofunc.tree import to_tensordict


def counting_all(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with all rows counting."""
    return {**batch, COUNTS: torch.ones(len(next(iter(batch.values()))))}


def together(parts: Sequence[StepResult]) -> tuple[float, float]:
    """Return the loss of a batch's parts, and its weight."""
    pairs = [(_value(part.loss), _value(part.weight)) for part in parts]
    weight = sum(weight for _, weight in pairs)
    return sum(loss * weight for loss, weight in pairs) / weight if weight else float("nan"), weight


def gradients(parts: Sequence[StepResult]) -> TensorDict:
    """Return the gradients of a batch's parts, each weighted like its part."""
    if len(parts) == 1:
        return to_tensordict(parts[0].grads)
    total = together(parts)[1]
    first, *others = ({path: grad * (_value(part.weight) / total) for path, grad in part.grads.items()} for part in parts)
    for other in others:
        first = {path: grad + other[path] for path, grad in first.items()}
    return to_tensordict(first)


def _value(scalar: Tensor | None) -> float:
    assert scalar is not None, "the last stage ends in a loss"
    return scalar.item()
