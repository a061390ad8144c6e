"""How much each microbatch of a run weighs in the loss: as much as its rows that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc.batch import COUNTS
from autofunc.losses import Loss, evaluate
from autofunc.runtime.step import StepResult
from autofunc.tree import to_tensordict


def weighed(loss: Loss | None, rows: int) -> Loss:
    """A loss whose microbatches weigh what their rows do, and nothing where none of them counts.

    A mean weighs the share of a full microbatch's rows that count; a `(sum, weight)` has its own weight.

    Args:
        loss: of the run; None for the model's own.
        rows: of a full microbatch.
    """

    def weigh(outputs: Any, microbatch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        counts = microbatch[COUNTS]
        rest = {name: value for name, value in microbatch.items() if name != COUNTS}
        value = loss(outputs, rest) if loss is not None else None
        terms = evaluate(None if loss is None else lambda *_: value, outputs, rest)
        share = (counts != 0).any().float() if isinstance(value, tuple) else counts.sum() / rows
        # where, because nothing times infinity is no number
        return torch.where(share > 0, terms.sum * share, 0.0), terms.weight * share

    weigh.may_weigh_nothing = True  # type: ignore[attr-defined]
    return weigh


def counting_all(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose rows all count."""
    return {**batch, COUNTS: torch.ones(len(next(iter(batch.values()))))}


def together(parts: Sequence[StepResult]) -> tuple[float, float]:
    """The loss of the parts of a batch, and its weight."""
    pairs = [(_value(part.loss), _value(part.weight)) for part in parts]
    weight = sum(weight for _, weight in pairs)
    return sum(loss * weight for loss, weight in pairs) / weight if weight else float("nan"), weight


def gradients(parts: Sequence[StepResult]) -> TensorDict:
    """The gradients of the parts of a batch, each weighing what its part does."""
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
