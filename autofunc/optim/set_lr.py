"""The learning rate of one update, instead of those that an optimizer was made with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from autofunc.errors import ModelError

Group = dict[str, Any]


def set_lr(optimizer: torch.optim.Optimizer, lr: float, factors: Sequence[float]) -> list[tuple[Group, Any, float]]:
    """Set the learning rate of all groups; returns these, what they had, and what they have now.

    Args:
        optimizer: made anew.
        lr: of those groups that have none of their own.
        factors: of the learning rate, by group; groups beyond these have none of their own.

    Raises:
        ModelError: when an optimizer inside has a learning rate of its own.
    """
    all_factors = [*factors, *[1.0] * len(optimizer.param_groups)]
    own = [
        (group, group.get("lr"), lr * factor) for group, factor in zip(optimizer.param_groups, all_factors, strict=False)
    ]
    known = {id(group) for group, _, _ in own}
    for inner in _optimizers_in(list(vars(optimizer).values())):
        for group in inner.param_groups:
            if id(group) in known:
                continue
            now = next((now for _, before, now in own if before == group.get("lr")), None)
            if now is None:
                raise ModelError(
                    f"update(lr={lr}) on {type(optimizer).__name__}, in which {type(inner).__name__} has "
                    f"lr={group.get('lr')} of its own: one number cannot be both; leave lr out"
                )
            own.append((group, group["lr"], now))
    for group, _, now in own:
        group["lr"] = now
    return own


def _optimizers_in(values: Iterable[Any]) -> Iterator[torch.optim.Optimizer]:
    for value in values:
        if isinstance(value, torch.optim.Optimizer):
            yield value
        elif type(value) in (list, tuple, dict):
            yield from _optimizers_in(value.values() if isinstance(value, dict) else value)
