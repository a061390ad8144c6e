"""A layer: a pair of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autofunc.errors import ModelError
from autofunc.random import InitKey
from autofunc.tree import Nested

Init = Callable[[InitKey], Nested]
Apply = Callable[[Mapping[str, Any], Any, Mapping[str, Any]], Any]


def no_parameters(key: InitKey) -> Nested:
    """The init of a layer without parameters."""
    return {}


def _not_given(params: Mapping[str, Any], x: Any, batch: Mapping[str, Any]) -> Any:
    """In the place of an `apply` that was forgotten; `Layer` refuses it."""
    raise NotImplementedError


@dataclass(frozen=True)
class Layer:
    """The unit of a model: a pair of pure functions. `af.Layer(apply=...)` is a layer without parameters.

    Args:
        init: `init(key) -> params`, a nested mapping of tensors; `key` is an `af.random.InitKey`.
        apply: `apply(params, x, batch) -> x`, pure. `params` are nested dicts of tensors as `init` made them (with tied
            parameters filled in), `x` is what the layer before returned (any pytree; None for the first layer), `batch` is
            the microbatch, a mapping.

    Raises:
        ModelError: without an `apply`, or for what cannot be called.

    Example:
        linear = af.Layer(
            init=lambda key: {"weight": key.normal("weight", (4, 8))},
            apply=lambda params, x, batch: x @ params["weight"].t(),
        )
    """

    init: Init = no_parameters
    apply: Apply = _not_given

    def __post_init__(self) -> None:
        if self.apply is _not_given:
            raise ModelError(
                "af.Layer(init, apply) needs apply(params, x, batch); a layer without parameters is af.Layer(apply=...)"
            )
        for name, function, form in (("init", self.init, "(key)"), ("apply", self.apply, "(params, x, batch)")):
            if not callable(function):
                raise ModelError(f"af.Layer: {name} is {type(function).__name__}; expected a function {name}{form}")
