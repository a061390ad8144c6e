"""A module with values: a copy of it that holds given tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.captured import Pretrained
from autofunc.captured.module import ModuleSource, source_of
from autofunc.errors import ModelError


def with_values(model: Pretrained | nn.Module, seed: int = 0) -> nn.Module:
    """The module itself when all its parameters are real; else a copy with them read, or initialised from the seed."""
    module = model.module if isinstance(model, Pretrained) else model
    if not any(leaf.is_meta for leaf in module.parameters()):
        return module
    source = source_of(model)
    made: nn.Module = filled(source, source.weights(list(source.parameters), seed, torch.device("cpu"), None))
    return made


def filled(source: ModuleSource, values: Mapping[str, Tensor]) -> Any:
    """A copy of a module that holds these tensors; they are not copied.

    Args:
        source: of the module.
        values: every parameter, by canonical path; and buffers that are others than the module's.

    Raises:
        ModelError: for a module that cannot be copied.
    """
    module = source.module
    memo: dict[int, Any] = {
        id(leaf): nn.Parameter(values[name], requires_grad=leaf.requires_grad) for name, leaf in module.named_parameters()
    }
    persistent = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in persistent or buffer.is_meta:
            memo[id(buffer)] = values[name] if name in values else source.buffer(name).cpu()
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(f"{source.what} cannot be copied: {type(error).__name__}: {error}") from error
