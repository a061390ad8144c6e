"""A layer: a pair of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autofunc.errors import ModelError
from autofunc.random import KEY, InitKey, drawing
from autofunc.tree import Nested

Init = Callable[[InitKey], Nested]
Apply = Callable[..., Any]


def drawing_as(name: str, apply: Apply) -> Apply:
    """A layer's `apply`, inside of which `af.random.dropout(x, p)` needs no batch."""

    def function(params: Nested, x: Any, batch: Mapping[str, Any], *rest: Any) -> Any:
        with drawing(batch.get(KEY), name):
            return apply(params, x, batch, *rest)

    return function


def no_parameters(key: InitKey) -> Nested:
    """The init of a layer without parameters."""
    return {}


def _not_given(*given: Any) -> Any:
    """In the place of an `apply` that was forgotten; `Layer` refuses it."""
    raise NotImplementedError


@dataclass(frozen=True)
class Layer:
    """The unit of a model: a pair of pure functions. `af.Layer(apply=...)` is a layer without parameters.

    Args:
        init: `init(key) -> params`, a nested mapping of tensors; `key` is an `af.random.InitKey`.
        apply: `apply(params, x, batch) -> x`, pure. `params` are nested dicts of tensors as `init` made them (with tied
            parameters filled in), `x` is what the layer before returned (any pytree; None for the first layer), `batch` is
            the microbatch, a mapping. A layer with state is `apply(params, x, batch, state, training) -> (x, state)`.
        init_state: `init_state(key) -> state`, a nested mapping of tensors: what the layer hands from one microbatch to the
            next, such as running statistics. No gradient goes through what it returns. `training` says whether that is
            kept: True for `af.value_and_grad`, False where the model is only evaluated.

    Raises:
        ModelError: without an `apply`, or for what cannot be called.

    Example:
        linear = af.Layer(
            init=lambda key: {"weight": key.normal("weight", (4, 8))},
            apply=lambda params, x, batch: x @ params["weight"].t(),
        )

        def centred(params, x, batch, state, training):
            mean = x.mean(0) if training else state["mean"]
            return x - mean, {"mean": 0.9 * state["mean"] + 0.1 * mean}

        centring = af.Layer(apply=centred, init_state=lambda key: {"mean": key.zeros("mean", (8,))})
    """

    init: Init = no_parameters
    apply: Apply = _not_given
    init_state: Init | None = None

    def __post_init__(self) -> None:
        if self.apply is _not_given:
            raise ModelError(
                "af.Layer(init, apply) needs apply(params, x, batch); a layer without parameters is af.Layer(apply=...)"
            )
        functions: list[tuple[str, Any, str]] = [("init", self.init, "(key)"), ("apply", self.apply, "(params, x, batch)")]
        if self.init_state is not None:
            functions.append(("init_state", self.init_state, "(key)"))
        for name, function, form in functions:
            if not callable(function):
                raise ModelError(f"af.Layer: {name} is {type(function).__name__}; expected a function {name}{form}")
