"""Record what a function dispatches as a graph of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx  # has no public name; tried with torch 2.13.0

from autofunc.graph.lazy_code import lazy_code


def trace(
    function: Callable[..., Any], *given: Any, decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    above_autograd: bool = False,
) -> fx.GraphModule:  # fmt: skip
    """The operators that a function runs on these tensors, autograd's included, in one graph.

    Args:
        function: with as many arguments as are given; not a method, of which `self` would be counted.
        given: tensors, or lists of tensors; their shapes are those of the graph.
        decompositions: operators that are recorded as others.
        above_autograd: record operators as the function calls them, before autograd and what it makes of them.
    """
    with lazy_code(), torch.autograd.set_detect_anomaly(False):  # it looks at values, and there are none
        made = make_fx(
            function, decomposition_table=decompositions, tracing_mode="real", pre_dispatch=above_autograd
        )  # fmt: skip
        return made(*given)
