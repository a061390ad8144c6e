"""`torch.cond` and `torch.while_loop` in a forward act as Python's `if` and `while`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import BatchError, ModelError
from tests.cases import assert_same_tree


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.second = (nn.Linear(6, 6) for _ in range(3))


class OfTorch(_Blocks):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.cond(ids.max() < 3, lambda h: self.other(h).tanh(), lambda h: h * 2, (h,))
        more = (lambda n, h: n < ids.max()), (lambda n, h: (n + 1, h.sin() * 2))
        return self.second(torch.while_loop(*more, (ids.new_zeros(()), h))[1]).square().mean()  # type: ignore[no-any-return]


class OfPython(_Blocks):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.first(x)
        h = self.other(h).tanh() if ids.max() < 3 else h * 2
        for _ in range(2):
            h = h.sin() * 2
        return self.second(h).square().mean()  # type: ignore[no-any-return]


def batch(largest: int = 2) -> dict[str, Tensor]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    return {"x": x, "ids": torch.tensor([[1, largest], [largest, 0], [0, largest], [largest, largest]])}


def pipeline(module: nn.Module) -> tuple[Any, Any]:
    model = af.from_module(module, batch(), verify=True)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    return af.value_and_grad(af.pipeline(af.split(model, ["second"]), s)), model.init()


def test_same_as_python() -> None:
    (step, params), (expected_step, expected_params) = pipeline(OfTorch()), pipeline(OfPython())
    (found_loss, found), (expected_loss, expected) = step(params, batch()), expected_step(expected_params, batch())
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


@pytest.mark.parametrize(("largest", "line"), [(3, "torch.cond"), (1, "torch.while_loop")])
def test_a_batch_that_decides_differently_stops_the_step(largest: int, line: str) -> None:
    step, params = pipeline(OfTorch())
    with pytest.raises(BatchError, match=line):
        step(params, batch(largest))


def test_it_can_be_refused() -> None:
    with pytest.raises(ModelError, match=r"line \d+: h = torch.cond"):
        af.from_module(OfTorch(), batch(), branches="refuse")
