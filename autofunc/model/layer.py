"""A layer: a pair of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autofunc.random import InitKey
from autofunc.tree import Nested

Init = Callable[[InitKey], Nested]
Apply = Callable[[Mapping[str, Any], Any, Mapping[str, Any]], Any]


def no_parameters(key: InitKey) -> Nested:
    """The init of a layer without parameters."""
    return {}


@dataclass(frozen=True)
class Layer:
    """The unit of a model.

    Args:
        apply: `apply(params, x, batch) -> x`, pure. `params` are nested dicts of tensors as `init` made them (with tied
            parameters filled in), `x` is what the layer before returned (any pytree; None for the first layer), `batch` is
            the microbatch, a mapping.
        init: `init(key) -> params`, a nested mapping of tensors; `key` is an `af.random.InitKey`.
    """

    apply: Apply
    init: Init = no_parameters
