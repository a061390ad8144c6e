"""A loss in which rows count as much as the batch says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autofunc.batch import COUNTS
from autofunc.losses import Loss, evaluate


def weighed(loss: Loss | None, rows: int) -> Loss:
    """A loss whose microbatches weigh what their rows do, and nothing where none of them counts.

    A mean weighs the share of a full microbatch's rows that count; a `(sum, weight)` has its own weight.

    Args:
        loss: of the run; None for the model's own.
        rows: what the counts of a full microbatch add up to.
    """

    def weigh(outputs: Any, microbatch: Mapping[str, Any]) -> tuple[Any, ...]:
        counts = microbatch[COUNTS]
        rest = {name: value for name, value in microbatch.items() if name != COUNTS}
        value = loss(outputs, rest) if loss is not None else None
        terms = evaluate(None if loss is None else lambda *_: value, outputs, rest)
        share = (counts != 0).any().float() if isinstance(value, tuple) else counts.sum() / rows
        # where, because nothing times infinity is no number
        weighed = (torch.where(share > 0, terms.sum * share, 0.0), terms.weight * share)
        return weighed if terms.aux is None else (*weighed, terms.aux)

    weigh.may_weigh_nothing = True  # type: ignore[attr-defined]
    weigh.aux_reductions = getattr(loss, "aux_reductions", {})  # type: ignore[attr-defined]
    return weigh
