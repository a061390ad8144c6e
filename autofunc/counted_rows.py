"""Weigh rows in a loss and in metrics by the counts in the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autofunc.batch import COUNTS
from autofunc.errors import BatchError
from autofunc.losses import Loss, evaluate


def weighed(loss: Loss | None, rows: int) -> Loss:
    """Return the loss with each microbatch weighted by its rows' counts; a microbatch without counting rows adds nothing.

    A mean gets as weight the counting share of a full microbatch's rows; a `(sum, weight)` keeps its own weight.

    Args:
        loss: of the run; None for the model's own.
        rows: sum of a full microbatch's counts.
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
    """Return a `weighed` loss whose aux holds each metric's sum and weight, to add up over microbatches.

    Args:
        loss: see `weighed`; its own aux is dropped.
        rows: see `weighed`.
        metrics: by name; `metric(outputs, microbatch)` returns a mean or `(sum, weight)`, as scalars.
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
        raise BatchError(f"the metric {name!r} must return a scalar mean or (sum, weight); got {_told(value)}")
    total, weight = (torch.as_tensor(each, device=counts.device).detach().float() for each in given)
    return _shared(total, weight, counts, None if isinstance(value, tuple) else rows)


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"({', '.join(map(_told, value))})" if isinstance(value, tuple) else type(value).__name__


def _apart(microbatch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Separate the rows' counts from the entries that user functions see."""
    return microbatch[COUNTS], {name: value for name, value in microbatch.items() if name != COUNTS}


def _shared(total: Tensor, weight: Tensor, counts: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
    """Scale a mean's sum and weight by its counting share of `rows`; keep others if any row counts, else zero them."""
    share = (counts != 0).any().float() if rows is None else counts.sum() / rows
    # where, because zero times infinity is NaN
    return torch.where(share > 0, total * share, 0.0), weight * share
