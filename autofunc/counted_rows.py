"""A loss, and what else is measured, in which rows count as much as the batch says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autofunc.batch import COUNTS
from autofunc.errors import BatchError
from autofunc.losses import Loss, evaluate


def weighed(loss: Loss | None, rows: int) -> Loss:
    """A loss whose microbatches weigh what their rows do, and nothing where none of them counts.

    A mean weighs the share of a full microbatch's rows that count; a `(sum, weight)` has its own weight.

    Args:
        loss: of the run; None for the model's own.
        rows: what the counts of a full microbatch add up to.
    """

    def weigh(outputs: Any, microbatch: Mapping[str, Any]) -> tuple[Any, ...]:
        counts, rest = _apart(microbatch)
        value = loss(outputs, rest) if loss is not None else None
        terms = evaluate(None if loss is None else lambda *_: value, outputs, rest)
        weighed = _shared(terms.sum, terms.weight, counts, None if isinstance(value, tuple) else rows)
        return weighed if terms.aux is None else (*weighed, terms.aux)

    weigh.may_weigh_nothing = True  # type: ignore[attr-defined]
    weigh.aux_reductions = getattr(loss, "aux_reductions", {})  # type: ignore[attr-defined]
    return weigh


def measured(loss: Loss | None, rows: int, metrics: Mapping[str, Loss]) -> Loss:
    """A loss as `weighed` makes it, whose aux has the sum and the weight of each metric, for sums over microbatches.

    Args:
        loss: see `weighed`; its own aux is left out.
        rows: see `weighed`.
        metrics: by name, `metric(outputs, microbatch)`: a mean, or `(sum, weight)`; scalars.
    """
    weigh = weighed(loss, rows)

    def measure(outputs: Any, microbatch: Mapping[str, Any]) -> tuple[Any, ...]:
        counts, rest = _apart(microbatch)
        aux = {name: torch.stack(_measured(name, metric(outputs, rest), counts, rows)) for name, metric in metrics.items()}
        return (*weigh(outputs, microbatch)[:2], aux)

    measure.may_weigh_nothing = True  # type: ignore[attr-defined]
    return measure


def _measured(name: str, value: Any, counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    given = value if isinstance(value, tuple) else (value, 1.0)
    if len(given) != 2 or any(isinstance(each, Tensor) and each.dim() for each in given):
        raise BatchError(f"the metric {name!r} must be a scalar, which is a mean, or (sum, weight); got {_told(value)}")
    total, weight = (torch.as_tensor(each, device=counts.device).detach().float() for each in given)
    return _shared(total, weight, counts, None if isinstance(value, tuple) else rows)


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"({', '.join(map(_told, value))})" if isinstance(value, tuple) else type(value).__name__


def _apart(microbatch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """How much each row counts, and what functions of the user get."""
    return microbatch[COUNTS], {name: value for name, value in microbatch.items() if name != COUNTS}


def _shared(total: Tensor, weight: Tensor, counts: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
    """A sum and its weight: of a mean over so many rows the share that counts, of others all where any row does."""
    share = (counts != 0).any().float() if rows is None else counts.sum() / rows
    # where, because nothing times infinity is no number
    return torch.where(share > 0, total * share, 0.0), weight * share
