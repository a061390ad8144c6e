"""Recurrent layers: the oracle's bits, and dropout between layers as a function of the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.random import make_key
from tests.captured.laws import check_layouts

X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.GRU, {"batch_first": True, "bidirectional": True}),
        (nn.GRU, {"bias": False, "num_layers": 2}),
        (nn.RNN, {"batch_first": True, "num_layers": 2}),
    ],
)
def test_bits_of_the_oracle(kind: Any, options: dict[str, Any]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.recurrent = nn.Linear(8, 8), kind(8, 4, **options)
            self.last = nn.Linear(8 if options.get("bidirectional") else 4, 8)

        def forward(self, x: Tensor) -> Tensor:
            h, states = self.recurrent(torch.tanh(self.first(x)))
            return self.last(h) * states.mean()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    check_layouts(
        Recurrent(), {"x": X}, [(["recurrent"], "1f1b"), (["last"], "zb_h1")], loss=lambda out, mb: out.square().mean()
    )


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers(kind: Any) -> None:
    """Dropout acts between layers, as torch's does; when it drops everything, the values are known."""
    torch.manual_seed(0)
    options = {"batch_first": True, "bidirectional": kind is nn.GRU}
    module = kind(8, 4, 3, dropout=1 - 2**-30, **options)
    model = af.from_module(module, {"input": X})
    params = model.init()
    found, states = model(params, {"input": X, "key": make_key(0)})
    expected, expected_states = module(X)
    torch.testing.assert_close((found, states), (expected, expected_states))
    plain, _ = module.eval()(X)
    torch.testing.assert_close(model(params, {"input": X})[0], plain)
    module.train().dropout = 0.5
    half = af.from_module(module, {"input": X})
    one, other = (half(params, {"input": X, "key": make_key(0, step)})[0] for step in (0, 1))
    assert not torch.equal(one, other) and not torch.equal(one, plain)
