"""Overriding an optimizer's learning rates for one update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from autofunc.errors import ModelError

Group = dict[str, Any]


def set_lr(optimizer: torch.optim.Optimizer, lr: float, factors: Sequence[float]) -> list[tuple[Group, Any, float]]:
    """Set the learning rate of all groups; return (group, rate before, rate now) for each.

    Args:
        optimizer: freshly built.
        lr: the base rate; a group's rate is this times its factor.
        factors: by group; 1 for groups beyond these.

    Raises:
        ModelError: if an optimizer inside has its own learning rate.
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
                    f"update(lr={lr}) on {type(optimizer).__name__}, whose inner {type(inner).__name__} has its own "
                    f"lr={group.get('lr')}: one number cannot set both; leave lr out"
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
