"""Shared helpers for Hugging Face configurations and state dicts.

Each model in this folder has the same three functions: `config_from_hf(config)`, whose result's fields are the arguments of
its builder, `from_hf(state_dict, config)` and `to_hf(params, config)`. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc.errors import ModelError, one_of
from autofunc.tree import to_tensordict

MODEL_TYPES = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "moe",
    "qwen3": "llama",
    "t5": "encoder_decoder",
}
"""`model_type` of a configuration -> the module in this folder that builds it."""

Config = TypeVar("Config")


def read_settings(module: str, config: Any) -> dict[str, Any]:
    """Return the entries of a configuration that `module` can build.

    Args:
        module: the calling module among `MODEL_TYPES`' values, such as "llama"; it begins all messages.
        config: an `AutoConfig` result, or the mapping in a `config.json`.

    Raises:
        ModelError: for anything else, or a `model_type` that is unknown or belongs to another module.
    """
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ModelError(
            f"{module}: a {type(config).__name__} is not a configuration; expected one of transformers, or its dict"
        )
    settings = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
    model_type = settings.get("model_type")
    home = MODEL_TYPES.get(str(model_type))
    if home is None:
        raise ModelError(f"{module}: unknown model_type {model_type!r}; {one_of(model_type, MODEL_TYPES)}")
    if home != module:
        raise ModelError(f"{module}: model_type {model_type!r} is built by stages.{home}")
    return settings


def require(module: str, settings: Mapping[str, Any], **expected: Any) -> None:
    """Refuse unsupported settings; absent ones count as expected.

    Raises:
        ModelError: naming the first.
    """
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ModelError(f"{module}: {name}={settings[name]!r} is not supported; expected {value!r}")


def fill(module: str, made: type[Config], settings: Mapping[str, Any], sizes: tuple[str, ...]) -> Config:
    """Build a model's own configuration from the settings named like its fields.

    Raises:
        ModelError: if one of `sizes` is missing, because no default fits every model.
    """
    for name in sizes:
        if settings.get(name) is None:
            raise ModelError(f"{module}: the configuration has no {name!r}; {one_of(name, settings)}")
    known = [field.name for field in fields(made)]  # type: ignore[arg-type]
    return made(**{name: settings[name] for name in known if name in settings})


def read_weights(
    module: str,
    given: Mapping[str, Tensor],
    spec: Mapping[str, Tensor],
    their_name: Callable[[str], str] = lambda path: path,
    read: Callable[[str, Tensor], Tensor] = lambda path, leaf: leaf,
) -> TensorDict:
    """Return parameters copied from a state dict.

    Args:
        module: for error messages.
        given: their name -> tensor.
        spec: our path -> a tensor of its shape.
        their_name: returns their name for our path.
        read: `read(path, leaf)` returns our parameter from their tensor.

    Raises:
        ModelError: if a weight is missing, unexpected or of the wrong shape.
    """
    flat: dict[str, Tensor] = {}
    for path, expected in spec.items():
        name = their_name(path)
        if name not in given:
            raise ModelError(f"{module}: the state dict has no {name!r}")
        flat[path] = read(path, given[name]).detach().clone(memory_format=torch.contiguous_format)
        if flat[path].shape != expected.shape:
            raise ModelError(
                f"{module}: {name!r} gives {path!r} the shape {tuple(flat[path].shape)}; expected {tuple(expected.shape)}"
            )
    left_over = set(given) - {their_name(path) for path in flat}
    if left_over:
        raise ModelError(f"{module}: the state dict has {min(left_over)!r}, which this model does not know")
    return to_tensordict(flat)


def drop_tied(module: str, given: dict[str, Tensor], alias: str, canonical: str) -> None:
    """Remove the alias of a tied weight from `given`, if present.

    Raises:
        ModelError: if its values differ.
    """
    leaf = given.pop(alias, None)
    if leaf is not None and not torch.equal(leaf, given.get(canonical, leaf)):
        raise ModelError(f"{module}: {alias} differs from {canonical}, but this model ties them")
