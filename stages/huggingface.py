"""What is known about Hugging Face's configurations and state dicts by every model of this folder.

Each model has the same three functions: `config_from_hf(config)`, whose result's fields are the arguments of its builder,
`from_hf(state_dict, config)` and `to_hf(params, config)`. Nothing here imports transformers.
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
"""`model_type` of a configuration -> the module of this folder that builds it."""

Config = TypeVar("Config")


def read_settings(module: str, config: Any) -> dict[str, Any]:
    """The entries of a configuration that `module` can build.

    Args:
        module: which of `MODEL_TYPES`' modules asks, such as "llama"; it begins all messages.
        config: what transformers' `AutoConfig` returns, or the mapping in a `config.json`.

    Raises:
        ModelError: for something else, or a `model_type` that is unknown or another module's.
    """
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ModelError(
            f"{module}: a {type(config).__name__} is no configuration; expected one of transformers, or its dict"
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
    """Refuse settings that a model does not follow; those that are absent have the expected value.

    Raises:
        ModelError: naming the first.
    """
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ModelError(f"{module}: {name}={settings[name]!r} is not supported; expected {value!r}")


def fill(module: str, made: type[Config], settings: Mapping[str, Any], sizes: tuple[str, ...]) -> Config:
    """A model's own configuration from the settings that have the names of its fields.

    Raises:
        ModelError: when one of `sizes` is missing, because no default fits every model.
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
    """Parameters from a state dict. Makes copies.

    Args:
        module: for messages.
        given: their name -> tensor.
        spec: our path -> a tensor of its shape.
        their_name: from our path to theirs.
        read: `read(path, leaf)` is our parameter in their tensor.

    Raises:
        ModelError: when a weight is missing, left over or of another shape.
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
    """Take a second name of a tied weight out of `given`, where it may be absent.

    Raises:
        ModelError: when it holds other values.
    """
    leaf = given.pop(alias, None)
    if leaf is not None and not torch.equal(leaf, given.get(canonical, leaf)):
        raise ModelError(f"{module}: {alias} differs from {canonical}, but this model ties them")
