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
    """Return a layer's `apply` in which `af.random.dropout(x, p)` needs no batch."""

    def function(params: Nested, x: Any, batch: Mapping[str, Any], *rest: Any) -> Any:
        with drawing(batch.get(KEY), name):
            return apply(params, x, batch, *rest)

    return function


def no_parameters(key: InitKey) -> Nested:
    """Return no parameters: the init of a layer without any."""
    return {}


def _not_given(*given: Any) -> Any:
    """Placeholder for a missing `apply`; `Layer` refuses it."""
    raise NotImplementedError


@dataclass(frozen=True)
class Layer:
    """The unit of a model: a pair of pure functions. `af.Layer(apply=...)` is a layer without parameters.

    Args:
        init: `init(key) -> params`, a nested mapping of tensors; `key` is an `af.random.InitKey`.
        apply: `apply(params, x, batch) -> x`, pure. `params` are nested dicts of tensors as returned by `init` (with tied
            parameters filled in), `x` is the previous layer's output (any pytree; None for the first layer), `batch` is the
            microbatch, a mapping. A layer with state is `apply(params, x, batch, state, training) -> (x, state)`.
        init_state: `init_state(key) -> state`, a nested mapping of tensors that the layer carries from one microbatch to
            the next, such as running statistics. No gradient flows through the state it returns. With `training` that
            state is kept: True in `af.value_and_grad`, False in evaluation.

    Raises:
        ModelError: without an `apply`, or for arguments that are not callable.

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
