"""Operators that do nothing are dropped from a captured graph, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autofunc.engine.simplify import simplify
from autofunc.graph.trace import trace

_aten = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "powers"),
    [
        (lambda x: _aten.pow.Tensor_Scalar(x, 1) + x, 0),
        (lambda x: _aten.pow.Tensor_Scalar(x, 1.0) * 2.0, 0),
        (lambda x: _aten.pow.Tensor_Scalar(x, 2.0) * 2.0, 1),
        (lambda x: _aten.pow.Tensor_Scalar(x.long(), 1.0) * 2.0, 1),  # makes floating point of integers
    ],
)
def test_first_powers_are_dropped(function: Callable[[Tensor], Tensor], powers: int) -> None:
    x = torch.tensor([-1.5, -0.0, 3.0, torch.nan, torch.inf])
    module = trace(function, x)
    simplify(module.graph)
    module.recompile()
    assert sum(node.target is _aten.pow.Tensor_Scalar for node in module.graph.nodes) == powers
    found, expected = module(x), function(x)
    (made,) = found if isinstance(found, (list, tuple)) else (found,)
    assert torch.equal(made.nan_to_num(), expected.nan_to_num())
    assert torch.equal(made.signbit(), expected.signbit())
