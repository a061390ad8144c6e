"""A copy of a module that holds given values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.captured.module_source import ModuleSource
from autofunc.errors import ModelError, in_brief, one_of


def filled(source: ModuleSource, values: Mapping[str, Tensor]) -> Any:
    """Copy a module, with these tensors as its parameters and buffers; they are not copied.

    Args:
        source: source of the module.
        values: every parameter by canonical path, and the buffers that differ from the module's. The copy is on the
            parameters' device.

    Raises:
        ModelError: for a module that cannot be copied.
    """
    module = source.module
    memo: dict[int, Any] = {
        id(leaf): nn.Parameter(values[name], requires_grad=leaf.requires_grad) for name, leaf in module.named_parameters()
    }
    device = next((values[name].device for name, _ in module.named_parameters()), None)
    persistent = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in values:
            memo[id(buffer)] = values[name]
        else:
            own = source.buffer(name) if name in persistent or buffer.is_meta else buffer
            memo[id(buffer)] = own.detach().to(device, copy=True)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(f"{source.what} cannot be copied: {in_brief(error)}") from error


def full_values(source: ModuleSource, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all parameters of a module by canonical path, and the given buffers, as `filled` takes them.

    Args:
        source: source of the module.
        given: parameters by canonical path, and buffers that are state. Parameters that no layer uses may be absent: they
            keep the values they have in the module or its files.

    Raises:
        ModelError: for a value that is missing, unknown or of another shape.
    """
    own = {**dict(source.module.named_buffers()), **source.parameters}
    extra = [name for name in given if name not in own]
    if extra:
        raise ModelError(f"{source.what} has no parameter {extra[0]!r}; {one_of(extra[0], source.parameters)}")
    missing = [name for name in source.parameters if name not in given]
    unknown = [name for name in missing if not source.has_value(name)]
    if unknown:
        raise ModelError(
            f"params have no {unknown[0]!r}, one of {len(unknown)} missing parameters of {source.what}; give the full "
            f"tree, with all stages (pipe.gather); {one_of(unknown[0], given)}"
        )
    for name, leaf in given.items():
        if leaf.shape != own[name].shape:
            raise ModelError(f"{name!r} is {tuple(leaf.shape)}, but {tuple(own[name].shape)} in {source.what}")
    device = next((leaf.device for leaf in given.values()), torch.device("cpu"))
    every = {**given, **source.weights(missing, 0, device, None)}
    ordered = [*source.parameters, *(name for name in given if name not in source.parameters)]
    return {name: every[name] for name in ordered}
