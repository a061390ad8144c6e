"""What a pipeline has built, by the signature of a batch: how much it remembers, and what makes it build again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from autofunc.errors import some_of

_MANY_CHANGES = 3  # of what functions read from outside, after which it is said where numbers that change belong
_MOST_PLANS = 64  # batch signatures a pipeline remembers; beyond that the oldest is forgotten
_MOST_NODES = 100_000  # of the graphs of all of them: half a GB


def forget(plans: dict[Any, Any], held: Sequence[int]) -> None:
    """Make room for another plan.

    Args:
        plans: all that are remembered, the oldest first.
        held: how many nodes the graphs of each have; the same on all ranks.
    """
    for number in range(len(held)):
        if number > len(held) - _MOST_PLANS and sum(held[number:]) <= _MOST_NODES:
            break
        plans.pop(next(iter(plans)))


def warn_of_changes(keys: Iterable[tuple[Any, Any]], around: Any, changed: Sequence[str]) -> None:
    """Say what makes plans anew, again and again, for batches that are known.

    Args:
        keys: of the plans: the signature of a step, and what its functions read from outside.
        around: the signature of this step.
        changed: what was read from outside, and is another now.
    """
    known = sum(each == around for each, _ in keys)
    if known == _MANY_CHANGES and changed:
        warnings.warn(
            f"{some_of(changed)} changed between steps, and each time the pipeline is captured anew ({known} times so "
            "far): put numbers that change into the batch, as tensors without dims",
            stacklevel=2,
        )
