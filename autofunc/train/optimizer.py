"""The optimizer of section `optimizer`, tried before anything runs."""

from __future__ import annotations

from typing import Any

import torch

from autofunc.config import FinetuneConfig, target_and_arguments
from autofunc.config.updates import OPTIMIZER_KEYS
from autofunc.errors import FAILURES, ConfigError, ModelError, in_brief
from autofunc.model import Model
from autofunc.optim import Optimizer, optimizer, optimizers
from autofunc.tree import to_tensordict


def build_optimizer(config: FinetuneConfig) -> Optimizer:
    """Build a run's optimizer, which may combine several.

    Raises:
        ConfigError: if a target cannot be found, or options conflict.
    """
    given = config.optimizer
    sections = (
        {f"optimizer[{n}]": each for n, each in enumerate(given)} if isinstance(given, list) else {"optimizer": given}
    )
    try:
        return optimizers(*(_one(section, where) for where, section in sections.items()))
    except ModelError as error:
        raise ConfigError(f"optimizer: {error}") from error


def _one(section: dict[str, Any], where: str) -> Optimizer:
    factory, options = target_and_arguments(section, where)
    own = {name: section[name] for name in OPTIMIZER_KEYS if name in section}
    return optimizer(factory, **own, **options)


def try_optimizer(made: Optimizer) -> None:
    """Update a zero parameter with zero gradients; it must stay finite.

    Raises:
        ConfigError: if an optimizer fails or gives values that are not finite.
    """
    for part, alone in made.separate().items():
        scratch = to_tensordict({"weight": torch.zeros(2, 2)})
        try:
            updated, _ = alone.update(scratch.clone(), alone.init(scratch), scratch)
        except ModelError as error:
            raise ConfigError(f"optimizer: {error}") from error
        except FAILURES as error:
            raise ConfigError(f"optimizer: {part!r} cannot update a parameter: {in_brief(error)}") from error
        if not updated["weight"].isfinite().all():
            raise ConfigError(
                f"optimizer: {part!r} makes a zero parameter infinite or NaN when it updates it with zero gradients"
            )


def check_optimizer(made: Optimizer, model: Model) -> None:
    """Refuse patterns and options that do not fit the model's trained parameters.

    Raises:
        ConfigError: naming the parameter, or the nearest path.
    """
    trained = {path: leaf for path, leaf in model.spec.items() if path not in model.ties and model.is_trainable(path)}
    try:
        made.check(trained)
    except ModelError as error:
        raise ConfigError(f"optimizer: {error}") from error
