"""The moving average of the parameters that a run trains: begun, moved on, and put in their place."""

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
    """The average before the first step: a copy of the parameters that are trained, at least in fp32.

    Args:
        model: says which are.
        params: of this process.
    """
    return to_tensordict({path: _copy(leaf) for path, leaf in _trained(model, params).items()})


def moved_on(model: Model, average: TensorDict, params: Nested, decay: float) -> TensorDict:
    """The average after another step."""
    return ema(average, to_tensordict(_trained(model, params)), decay)


def in_place(average: Nested, params: Nested) -> TensorDict:
    """The parameters with the average in the place of those that are trained, in their dtypes; both stay as they are."""
    found = flatten(average)
    return to_tensordict(
        {path: found[path].to(leaf.dtype) if path in found else leaf for path, leaf in flatten(params).items()}
    )


def _trained(model: Model, params: Nested) -> Mapping[str, Tensor]:
    return {path: leaf for path, leaf in flatten(params).items() if model.is_trainable(path)}


def _copy(leaf: Tensor) -> Tensor:
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    return like(leaf, local(leaf).detach().to(dtype, copy=True))
