"""The learning rate of each step, from section `lr_scheduler`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from autofunc.config import FinetuneConfig, import_object, instantiate, target_and_arguments
from autofunc.errors import ConfigError, ModelError
from autofunc.optim import LearningRate, Optimizer, lr_schedule

_SECTION = "lr_scheduler"


def learning_rate_of(config: FinetuneConfig, optimizer: Optimizer, num_steps: int) -> LearningRate | None:
    """Return the learning rate by step; None if it is constant.

    Args:
        config: the configuration.
        optimizer: has the base learning rate.
        num_steps: of the run.

    Raises:
        ConfigError: if options conflict, or the scheduler cannot run for that many steps.
    """
    section = config.lr_scheduler
    if section is None:
        return None
    if optimizer.lr is None:
        raise ConfigError(f"{_SECTION}: {optimizer!r} has no learning rate to start from; set optimizer.lr")
    try:
        if isinstance(section, Mapping):
            made = LearningRate(lambda scratch: _made(section, _SECTION, scratch), optimizer.lr, section["_target_"])
        else:
            options = section.model_dump(exclude={"lr_decay_style"})
            options["lr_decay_steps"] = section.lr_decay_steps or num_steps
            made = lr_schedule(section.lr_decay_style, optimizer.lr, **options)
        made.check(num_steps)
    except ModelError as error:
        raise ConfigError(f"{_SECTION}: {error}") from error
    return made


def _made(section: Mapping[str, Any], where: str, optimizer: Any) -> LRScheduler:
    """Build the scheduler that a section names, and those its subsections name."""
    target, options = target_and_arguments(section, where)
    if isinstance(target, type) and not issubclass(target, LRScheduler):
        raise ModelError(f"{where}: expected a scheduler of torch.optim.lr_scheduler; got {section['_target_']}")
    options = {name: _value(name, value, f"{where}.{name}", optimizer) for name, value in options.items()}
    by_name = "optimizer" in inspect.signature(target).parameters  # not the first parameter of ChainedScheduler
    made = target(optimizer=optimizer, **options) if by_name else target(optimizer, **options)
    if not isinstance(made, LRScheduler):
        raise ModelError(f"{where}: expected a scheduler of torch.optim.lr_scheduler; got {type(made).__name__}")
    return made


def _value(name: str, value: Any, where: str, optimizer: Any) -> Any:
    if isinstance(value, list):
        return [_value(name, each, f"{where}[{number}]", optimizer) for number, each in enumerate(value)]
    if name == "lr_lambda" and isinstance(value, str):
        return import_object(value, where)
    if not isinstance(value, Mapping) or "_target_" not in value:
        return value
    return _made(value, where, optimizer) if name == "schedulers" else instantiate(value, where)
