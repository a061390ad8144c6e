"""In-place writes: wherever a module is cut between them, its loss and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from tests.captured.laws import close, plain_loop

Step = Callable[[Tensor, nn.Module, int], Tensor]


def residual(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    x += torch.tanh(layer(x.clone()))
    return x


def activation(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    return layer(torch.relu_(x))  # type: ignore[no-any-return]


def slot(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    x[:, number] = torch.tanh(layer(x[:, number - 1].clone()))
    return x


def slice_of_a_slice(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    x[:, 1:][..., : 2 + number].add_(layer(x.mean(1)).unsqueeze(1)[..., : 2 + number])
    return x


def through_a_transposed_view(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    x.transpose(1, 2)[:, number].mul_(layer(x.mean(1))[:, :1].sigmoid())
    return x


def through_a_reshaped_view(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    x.view(x.shape[0], -1)[:, number::5] -= layer(x.mean(1))[:, :1]
    return x


def a_view_made_before_and_read_after(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    first = x[:, 0]
    whole = x.permute(0, 2, 1)
    x[:, 0] = layer(x.mean(1))
    return x + first.unsqueeze(1) + whole.mean((1, 2), keepdim=True)


def what_a_write_returns(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    y = x.add_(layer(x.mean(1)).unsqueeze(1))
    x.mul_(0.5)
    return y


def masked(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    x.masked_fill_(x > 1.0, 0.5).sub_(layer(x.mean(1)).unsqueeze(1))
    x[:, -1].zero_()
    x[:, number].fill_(0.25)
    return x


def diagonal(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    x.diagonal(dim1=1, dim2=2).mul_(layer(x.mean(1))[:, :4])
    return x


def another_shape(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    y = torch.sin(layer(x))
    y.unsqueeze_(0)
    y.transpose_(0, 1).squeeze_(1)
    y.mul_(0.5)
    return x + y


def converted_to_the_same_dtype(x: Tensor, layer: nn.Module, number: int) -> Tensor:
    y, _ = torch.sort(torch.sin(layer(x)), -1)
    y += y.sum(-1, keepdim=True)
    y = y.to(x.dtype)
    y *= 0.5
    return x + y.type_as(x)


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (
        residual, activation, slot, slice_of_a_slice, through_a_transposed_view, through_a_reshaped_view,
        a_view_made_before_and_read_after, what_a_write_returns, masked, diagonal, another_shape,
        converted_to_the_same_dtype,
    )
}  # fmt: skip


class Written(nn.Module):
    """A value that each layer writes to."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(6, 6), nn.Linear(6, 6), step
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, layer in enumerate(self.layers, start=1):
            x = self.step(x, layer, number)
        return self.last(x)  # type: ignore[no-any-return]


def squared(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return (outputs.float() - microbatch["target"]).square().mean()


def check(module: nn.Module, batch: Mapping[str, Any], points: list[str], engine: str, remat: str | None = None) -> None:
    expected_loss, expected = plain_loop(module, lambda module, each: module(each["x"]), batch, 2, squared)
    stages = af.split(af.from_module(module, batch, inputs=["x"]), points)
    s = af.schedule.build("zb_h1", num_ranks=len(stages), num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=squared, engine=engine, remat=remat)
    found_loss, found = af.value_and_grad(pipe)(pipe.init(), batch)
    torch.testing.assert_close(found_loss, expected_loss)
    close(found, expected)


@pytest.mark.parametrize("name", STEPS)
def test_every_block_boundary_can_be_cut(name: str) -> None:
    torch.manual_seed(0)
    module = Written(STEPS[name])
    batch = {"x": torch.randn(4, 4, 6), "target": torch.randn(4, 4, 6)}
    for engine in ("eager", "graph"):
        check(module, batch, ["layers.1", "layers.2", "last"], engine)


@pytest.mark.parametrize("remat", ["layer", "stage"])
def test_recomputation_repeats_writes(remat: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Conv1d(8, 8, 3), nn.ReLU(inplace=True)
    )
    batch = {"x": torch.randn(4, 3, 10), "target": torch.randn(4, 8, 6)}
    check(module, batch, ["2"], "graph", remat)
    check(module, batch, ["4"], "eager", remat)


def test_a_residual_stream_of_lower_precision() -> None:
    """Values added in fp32 are rounded to the stream's dtype."""
    torch.manual_seed(0)

    def step(x: Tensor, layer: nn.Module, number: int) -> Tensor:
        x += layer(x.float().sin().to(x.dtype)).float() * 0.1
        return x

    module = Written(step).bfloat16()
    batch = {"x": torch.randn(4, 5, 6).bfloat16(), "target": torch.randn(4, 5, 6)}
    expected = plain_loop(module, lambda module, each: module(each["x"]), batch, 2, squared)[0]
    stages = af.split(af.from_module(module, batch, inputs=["x"]), ["layers.1", "layers.2"])
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=3, num_microbatches=2), loss=squared)
    assert torch.equal(af.value_and_grad(pipe)(pipe.init(), batch)[0], expected)
