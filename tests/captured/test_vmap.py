"""Functions mapped by `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import ModelError
from tests.captured.laws import check_layouts

TOKENS = 3


def same(ids: Tensor) -> Tensor:
    """Compares tokens one pair at a time."""
    inner = torch.vmap(torch.vmap(torch.eq, (None, 0)), (0, None))
    return torch.vmap(lambda row: inner(row, row))(ids)


MAPPED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "of the batch": lambda module, h, ids: h * same(ids).sum(-1, keepdim=True),
    "of weights": lambda module, h, ids: torch.vmap(module.layers[1])(h),
    "in no layer": lambda module, h, ids: h + torch.vmap(lambda t: (t, t.sum()))(torch.ones(6, 2))[1],
}


class Mapping(nn.Module):
    def __init__(self, mapped: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.mapped = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]), mapped

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        h = self.mapped(self, torch.tanh(self.layers[0](x)), ids)
        return {"loss": self.layers[2](torch.tanh(self.layers[1](h))).square().mean()}


BATCH = {
    "x": torch.randn(4, TOKENS, 6, generator=torch.Generator().manual_seed(0)),
    "ids": torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0]]),
}


@pytest.mark.parametrize("name", MAPPED)
def test_equal_to_the_plain_loop(name: str) -> None:
    check_layouts(Mapping(MAPPED[name]), BATCH, [(2, "1f1b")])


def test_mapped_and_differentiated() -> None:
    square = torch.func.grad(lambda row: row.square().sum())
    module = Mapping(lambda module, h, ids: h + torch.vmap(square)(torch.ones(3, 6)))
    with pytest.raises(ModelError, match=r"differentiates inside its forward .*test_vmap.py"):
        af.from_module(module, BATCH)
