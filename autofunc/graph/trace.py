"""Tracing: recording the operators that a function dispatches as a graph."""

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
    """Return a graph of the operators that a function runs on these tensors, including autograd's.

    Args:
        function: takes as many arguments as are given; not a method, since `self` would be counted.
        given: tensors, or lists of tensors; their shapes become the graph's.
        decompositions: operator -> function to trace instead.
        above_autograd: record operators as the function calls them, before autograd decomposes them.
    """
    with lazy_code(), torch.autograd.set_detect_anomaly(False):  # anomaly mode reads values, and fake tensors have none
        made = make_fx(
            function, decomposition_table=decompositions, tracing_mode="real", pre_dispatch=above_autograd
        )  # fmt: skip
        return made(*given)
