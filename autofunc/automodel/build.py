"""From a description to a module whose parameters take no memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from autofunc.automodel import in_transformers
from autofunc.automodel.description import Description, config_for
from autofunc.automodel.registry import ARCHITECTURES
from autofunc.captured import empty_weights
from autofunc.errors import FAILURES, AutofuncError, ModelError, in_brief


def find_registered(description: Description) -> type[nn.Module] | None:
    """Return the registered class: by `architectures`, or by `model_type` if that names no known class; None if absent."""
    named = description.architecture
    if named is not None:
        found = ARCHITECTURES.find(named)
        if found is not None or in_transformers.find_class(named) is not None:
            return found
    return ARCHITECTURES.find_by_type(description.model_type) if description.model_type is not None else None


class Most(NamedTuple):
    """Size limits of a module. A config that exceeds them is wrong, and would keep its class building for hours."""

    tensors: float = 1_000_000  # parameters
    elements: float = math.inf  # of all parameters

    @classmethod
    def of_stored(cls, shapes: Collection[tuple[int, ...]]) -> Most:
        """Return limits for a module whose stored weights have these shapes; it may split them and add new ones."""
        return cls(10 * len(shapes) + 1000, 10 * sum(map(math.prod, shapes)) + 10**7)


def build(
    description: Description,
    dtype: torch.dtype | None,
    *,
    trust_remote_code: bool,
    most: Most | None = None,
) -> nn.Module:
    """Build the module of a description, with parameters that take no memory.

    Args:
        description: of the model.
        dtype: of floating-point parameters; None takes torch's default.
        trust_remote_code: see `in_transformers.class_and_config`.
        most: size limits of the module.

    Raises:
        ModelError: if there is no class for it, or the class refuses its config or builds too many parameters.
    """
    cls: Any = find_registered(description)
    if cls is not None:
        config = config_for(cls, description)
    else:
        cls, config = in_transformers.class_and_config(description, trust_remote_code=trust_remote_code)
        in_transformers.set_dtype(config, dtype)
    what = f"{description.what}: {cls.__name__}"
    with _at_most(most or Most(), what):
        return _build(lambda: cls(config), dtype, what)


def without_values(module: nn.Module) -> nn.Module:
    """Move a module's remaining real parameters to the meta device, in place, and return it; ties stay ties."""
    empty: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, leaf in part._parameters.items():
            if leaf is not None and not leaf.is_meta:
                made = nn.Parameter(torch.empty_like(leaf, device="meta"), requires_grad=leaf.requires_grad)
                part._parameters[name] = empty.setdefault(id(leaf), made)
    return module


def _build(make: Callable[[], nn.Module], dtype: torch.dtype | None, what: str) -> nn.Module:
    """Build a module without values."""
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


@contextmanager
def _at_most(most: Most, what: str) -> Iterator[None]:
    """Abort building a module as soon as it exceeds its size limits."""
    tensors = elements = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, elements
        tensors, elements = tensors + 1, elements + (0 if parameter is None else parameter.numel())
        if tensors > most.tensors or elements > most.elements:
            raise ModelError(
                f"{what} has {tensors:,} parameters or more, of {elements:,} elements, with this config; do its numbers, "
                "such as the number of layers, match its weights?"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _keep_in_fp32(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep the parameters in fp32 that a transformers model excludes from half precision."""
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
