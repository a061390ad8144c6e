"""The moving average of trained parameters: start it, update it, and substitute it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc.model import Model
from autofunc.optim import ema
from autofunc.shard.dtensors import like, local
from autofunc.tree import Nested, flatten, to_tensordict


def begun(model: Model, params: Nested) -> TensorDict:
    """Return the initial average: a copy of the trained parameters, in fp32 or wider.

    Args:
        model: tells which parameters are trained.
        params: of this process.
    """
    return to_tensordict({path: _copy(leaf) for path, leaf in _trained(model, params).items()})


def moved_on(model: Model, average: TensorDict, params: Nested, decay: float) -> TensorDict:
    """Return the average after another step."""
    return ema(average, to_tensordict(_trained(model, params)), decay)


def in_place(average: Nested, params: Nested) -> TensorDict:
    """Return the parameters with trained ones replaced by their average, in their dtypes; inputs are unchanged."""
    found = flatten(average)
    return to_tensordict(
        {path: found[path].to(leaf.dtype) if path in found else leaf for path, leaf in flatten(params).items()}
    )


def _trained(model: Model, params: Nested) -> Mapping[str, Tensor]:
    return {path: leaf for path, leaf in flatten(params).items() if model.is_trainable(path)}


def _copy(leaf: Tensor) -> Tensor:
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    return like(leaf, local(leaf).detach().to(dtype, copy=True))
