"""Shortcuts to operators dispatch exactly those operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autofunc.engine.direct import DIRECT

_aten = torch.ops.aten
X, Y = torch.arange(6.0).view(2, 3), torch.ones(3, 2)

ARGUMENTS: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    _aten.add.Tensor: [((X, X), {}), ((X, 2), {}), ((X, X), {"alpha": 3})],
    _aten.addmm.default: [((X[0, :2], X, Y), {}), ((X[0, :2], X, Y), {"beta": 2, "alpha": 3})],
    _aten.bmm.default: [((X[None], Y[None]), {})],
    _aten.cat.default: [(([X, X],), {}), (([X, X], -1), {})],
    _aten.clone.default: [((X.t(),), {}), ((X.t(),), {"memory_format": torch.contiguous_format})],
    _aten.div.Tensor: [((X, X + 1), {}), ((X, 3.0), {})],
    _aten.expand.default: [((X[:1], [4, 3]), {})],
    _aten.mm.default: [((X, Y), {})],
    _aten.mul.Tensor: [((X, X), {}), ((X, 0.1), {})],
    _aten.neg.default: [((X,), {})],
    _aten.permute.default: [((X, [1, 0]), {})],
    _aten.pow.Tensor_Scalar: [((X, 2), {}), ((X, 3.5), {})],
    _aten.rsqrt.default: [((X + 1,), {})],
    _aten.squeeze.dim: [((X[None], 0), {})],
    _aten.sub.Tensor: [((X, X), {"alpha": 2}), ((X, 0.5), {})],
    _aten.sum.dim_IntList: [((X, [0], True), {}), ((X, [-1]), {"dtype": torch.float64})],
    _aten.t.default: [((X,), {})],
    _aten.transpose.int: [((X, 0, -1), {})],
    _aten.unsqueeze.default: [((X, 1), {})],
    _aten.view.default: [((X, [3, 2]), {}), ((X, [-1]), {})],
}


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append((func, [str(each) for each in args], {key: str(value) for key, value in (kwargs or {}).items()}))
        return func(*args, **(kwargs or {}))


def of_call(call: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Tensor]:
    with Calls() as calls:
        value = call(*args, **kwargs)
    return calls.found, value


@pytest.mark.parametrize("operator", DIRECT, ids=str)
def test_shortcuts_dispatch_the_same_operator(operator: Any) -> None:
    for args, kwargs in ARGUMENTS[operator]:
        expected, value = of_call(operator, args, kwargs)
        found, other = of_call(DIRECT[operator], args, kwargs)
        assert found == expected
        assert len(found) == 1
        assert (other.dtype, other.stride()) == (value.dtype, value.stride())
        assert torch.equal(other, value)
