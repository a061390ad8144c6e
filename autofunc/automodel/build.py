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
    """The registered class for a model: by `architectures`, or by `model_type` where that names nothing that is known."""
    named = description.architecture
    if named is not None:
        found = ARCHITECTURES.find(named)
        if found is not None or in_transformers.find_class(named) is not None:
            return found
    return ARCHITECTURES.find_by_type(description.model_type) if description.model_type is not None else None


class Most(NamedTuple):
    """How large a module may be. A config that asks for more is wrong, and would keep its class building for hours."""

    tensors: float = 1_000_000  # that are parameters
    elements: float = math.inf  # of all of them

    @classmethod
    def of_stored(cls, shapes: Collection[tuple[int, ...]]) -> Most:
        """For a module whose weights have these shapes; it may cut them, and have some that are made anew."""
        return cls(10 * len(shapes) + 1000, 10 * sum(map(math.prod, shapes)) + 10**7)


def build(
    description: Description,
    dtype: torch.dtype | None,
    *,
    trust_remote_code: bool,
    most: Most | None = None,
) -> nn.Module:
    """The module that a description says.

    Args:
        description: of the model.
        dtype: of floating-point parameters; None: torch's default.
        trust_remote_code: see `in_transformers.class_and_config`.
        most: how large the module may be.

    Raises:
        ModelError: when there is no class for it, the class cannot be called with its config, or makes too many parameters.
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


@contextmanager
def _at_most(most: Most, what: str) -> Iterator[None]:
    """Stop the building of a module as soon as it is larger than it may be."""
    tensors = elements = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, elements
        tensors, elements = tensors + 1, elements + (0 if parameter is None else parameter.numel())
        if tensors > most.tensors or elements > most.elements:
            raise ModelError(
                f"{what} has {tensors:,} parameters or more, of {elements:,} elements, with this config; are its numbers, "
                "of layers say, those of its weights?"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


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
