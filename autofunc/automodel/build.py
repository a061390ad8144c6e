"""From a description to a module whose parameters take no memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autofunc.automodel import in_transformers
from autofunc.automodel.description import Description, config_for
from autofunc.automodel.registry import ARCHITECTURES
from autofunc.captured import empty_weights
from autofunc.errors import FAILURES, AutofuncError, ModelError, in_brief


def find_registered(description: Description) -> type[nn.Module] | None:
    """The registered class for a model: by `architectures`, or by `model_type` where that names nothing that is known."""
    named = description.architecture
    if named is not None:
        found = ARCHITECTURES.find(named)
        if found is not None or in_transformers.find_class(named) is not None:
            return found
    return ARCHITECTURES.find_by_type(description.model_type) if description.model_type is not None else None


def build(description: Description, dtype: torch.dtype | None, *, trust_remote_code: bool) -> nn.Module:
    """The module that a description says.

    Args:
        description: of the model.
        dtype: of floating-point parameters; None: torch's default.
        trust_remote_code: see `in_transformers.class_and_config`.

    Raises:
        ModelError: when there is no class for it, or the class cannot be called with its config.
    """
    cls: Any = find_registered(description)
    if cls is not None:
        config = config_for(cls, description)
    else:
        cls, config = in_transformers.class_and_config(description, trust_remote_code=trust_remote_code)
        in_transformers.set_dtype(config, dtype)
    return _build(lambda: cls(config), dtype, f"{description.what}: {cls.__name__}")


def without_values(module: nn.Module) -> nn.Module:
    """The module, with its remaining real parameters on the meta device too; ties stay ties."""
    empty: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, leaf in part._parameters.items():
            if leaf is not None and not leaf.is_meta:
                made = nn.Parameter(torch.empty_like(leaf, device="meta"), requires_grad=leaf.requires_grad)
                part._parameters[name] = empty.setdefault(id(leaf), made)
    return module


def _build(make: Callable[[], nn.Module], dtype: torch.dtype | None, what: str) -> nn.Module:
    """The one place that says how a module is built without values."""
    try:
        with empty_weights(), _default_dtype(dtype):
            module = make()
    except AutofuncError:
        raise
    except FAILURES as error:
        raise ModelError(f"{what} cannot be built from its config: {in_brief(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{what} returned {type(module).__name__}, not an nn.Module")
    _keep_in_fp32(module, dtype)
    return module


def _keep_in_fp32(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Some of transformers' models name parameters that no half precision may have."""
    plan = getattr(module, "_get_dtype_plan", None)
    for pattern, kept in plan(dtype).items() if callable(plan) and dtype is not None else ():
        for name, leaf in module.named_parameters():
            if re.search(rf"(^|\.){re.escape(pattern)}($|\.)", name):
                leaf.data = leaf.data.to(kept)


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
