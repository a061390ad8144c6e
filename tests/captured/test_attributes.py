"""Attributes that a forward writes: undone where each forward writes them first, refused where the next reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import ModelError
from tests.captured.laws import assert_unchanged, close, contents, plain_loop

BATCH = {"x": torch.randn(4, 6)}


def squared(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return outputs.square().mean()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]), nn.Linear(6, 6)


class WeightMade(Base):
    """A weight computed from two parameters before use, like the old weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1))
        self.weight = torch.zeros(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.weight = self.scale * self.layers[0].weight / self.layers[0].weight.norm(dim=1, keepdim=True)
        x = torch.tanh(nn.functional.linear(x, self.weight, self.layers[0].bias))
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        return self.last(x)  # type: ignore[no-any-return]


class Window(Base):
    """A size that forward reduces to the input's, whether or not it was reduced before."""

    window = 9

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= self.window:
            self.window = x.shape[1]
        for layer in self.layers:
            x = torch.tanh(layer(x)).roll(self.window // 2, 1)
        return self.last(x)  # type: ignore[no-any-return]


class Collected(Base):
    """Losses stored by each layer and collected at the end."""

    def forward(self, x: Tensor) -> Tensor:
        self.losses: list[Tensor] = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            layer.l_aux = x.square().mean(1, keepdim=True)
        self.losses += [layer.l_aux for layer in self.layers]  # type: ignore[misc]
        return self.last(x) + sum(self.losses)  # type: ignore[no-any-return]


class Remembered(Base):
    """Features kept for inspection; forward never reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            self.features[f"layer {number}"] = x
            self.history.append(x)
        return self.last(x.to(torch.float32))  # type: ignore[no-any-return]


class Recast(Base):
    """Notes its input's dtype before converting."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = x.dtype
        x = self.layers[1](self.layers[0](x.to(torch.float32)).to(torch.float32))
        return self.last(self.layers[2](x)).to(self.given)  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", [WeightMade, Window, Collected, Remembered, Recast])
def test_written_before_read(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, untouched = cls(), cls()
    untouched.load_state_dict(module.state_dict())
    before = contents(module)
    expected_loss, expected = plain_loop(untouched, lambda module, each: module(**each), BATCH, 2, squared)
    for engine in ("eager", "graph"):
        stages = af.split(af.from_module(module, BATCH), ["layers.1", "last"])
        pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=3, num_microbatches=2), loss=squared, engine=engine)
        loss, grads = af.value_and_grad(pipe)(pipe.init(), BATCH)
        torch.testing.assert_close(loss, expected_loss)
        close(grads, expected)
    assert_unchanged(before, module)
    report = af.check(module, BATCH, loss=squared)
    assert report.ok, report


class Counting(Base):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.last(self.layers[0](x) / self.steps)  # type: ignore[no-any-return]


class Averaging(Base):
    """An exponential average kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.last(x - self.mean)  # type: ignore[no-any-return]


class Growing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.layers[0](x))
        return self.last(sum(self.seen))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("cls", "attribute"), [(Counting, "steps"), (Averaging, "mean"), (Growing, "seen")])
def test_read_by_the_next_forward(cls: type[nn.Module], attribute: str) -> None:
    with pytest.raises(
        ModelError, match=rf"keeps state from one forward to the next: {cls.__name__} .* stores '{attribute}'"
    ):
        af.from_module(cls(), BATCH)
