"""Values that are not contiguous: cut anywhere, in either engine, results are the module's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from tests.captured.laws import close, plain_loop

BOTH = ["eager", "graph"]


class Blocks(nn.Module):
    """Calls `step` on each of its layers in turn."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        return torch.tanh(layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.step(x, layer)
        return x


class Transposed(Blocks):
    """Each layer works along the other dimension."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        return x + torch.tanh(layer(x.transpose(1, 2))).transpose(1, 2).roll(1, 1)


class Expanded(Blocks):
    """Values between layers repeat rows without memory for them."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        return torch.tanh(layer(x)).mean(1, keepdim=True).expand_as(x)


class Normed(Blocks):
    """A norm that needs contiguous memory gets permuted values, and passes on permuted ones."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        return functional.group_norm(layer(x).permute(0, 2, 1), 2).permute(0, 2, 1)


class Merged(Blocks):
    """Merges dims of results that kernels lay out differently from fake tensors."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        gates = functional.softplus(layer(x).transpose(1, 2))
        return x * gates.transpose(1, 2).reshape(x.shape[0], -1).view(x.shape).sigmoid()


class Windows(Blocks):
    """Overlapping windows of a value, read in place."""

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        x = torch.tanh(layer(x.transpose(1, 2).contiguous().transpose(1, 2)))
        flat = x.flatten(1)
        windows = flat.as_strided((flat.shape[0], flat.shape[1] - 2, 3), (flat.stride(0), flat.stride(1), flat.stride(1)))
        return x + functional.pad(windows.mean(2), (1, 1)).view(x.shape)


class Pictures(nn.Module):
    """Convolutions and group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.layers = nn.ModuleList([nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + functional.pad(layer(x), (1, 1, 1, 1))
        return x


def linears(cls: type[Blocks], features: int = 6) -> Callable[[], nn.Module]:
    return lambda: cls(*(nn.Linear(features, features) for _ in range(3)))


def frozen_norms() -> nn.Module:
    return Transposed(*(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(8)) for _ in range(3))).eval()


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed": (linears(Transposed, 8), (8, 6)),
    "expanded": (linears(Expanded), (8, 6)),
    "normed": (linears(Normed), (8, 6)),
    "merged": (linears(Merged), (8, 6)),
    "windows": (linears(Windows), (8, 6)),
    "pictures": (Pictures, (8, 8, 8)),
    "pictures in channels_last": (lambda: Pictures().to(memory_format=torch.channels_last), (8, 8, 8)),  # type: ignore[call-overload]
}
LOSSES: dict[str, Callable[[Any, Mapping[str, Any]], Tensor]] = {
    "mse of permuted": lambda out, mb: functional.mse_loss(out.movedim(1, -1), mb["target"].movedim(1, -1).contiguous()),
    "smooth l1": lambda out, mb: functional.smooth_l1_loss(out, mb["target"].transpose(1, 2).contiguous().transpose(1, 2)),
    "huber of transposed": lambda out, mb: functional.huber_loss(
        out.transpose(1, 2), mb["target"].transpose(1, 2).contiguous()
    ),
}


def check(
    module: nn.Module, batch: Mapping[str, Any], points: list[str], engine: str,
    loss: Callable[[Any, Mapping[str, Any]], Tensor], schedule: str = "zb_h1",
) -> None:  # fmt: skip
    """Loss and gradients are the module's own, but not bit for bit: other strides give sums another order."""
    expected_loss, expected = plain_loop(module, lambda module, each: module(each["x"]), batch, 2, loss)
    stages = af.split(af.from_module(module, batch, inputs=["x"]), points)
    s = af.schedule.build(schedule, num_ranks=len(stages), num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=loss, engine=engine)
    for _ in range(2):  # the first step is watched
        found_loss, found = af.value_and_grad(pipe)(pipe.init(), batch)
        torch.testing.assert_close(found_loss, expected_loss)
        close(found, expected)


FIRST, *OTHERS = LOSSES


@pytest.mark.parametrize("loss", [FIRST, *(pytest.param(loss, marks=pytest.mark.full) for loss in OTHERS)])
@pytest.mark.parametrize("name", MODULES)
def test_every_cut(name: str, loss: str) -> None:
    build, shape = MODULES[name]
    torch.manual_seed(0)
    module = build()
    batch = {"x": torch.randn(4, *shape), "target": torch.randn(4, *shape)}
    for engine in BOTH:
        check(module, batch, ["layers.1", "layers.2"], engine, LOSSES[loss])


@pytest.mark.parametrize("engine", BOTH)
def test_batches_with_other_strides(engine: str) -> None:
    """A plan is for one batch's strides: the same shapes with other strides are captured again."""
    torch.manual_seed(0)
    module = Normed(*(nn.Linear(6, 6) for _ in range(3)))
    stages = af.split(af.from_module(module, {"x": torch.randn(4, 8, 6)}), ["layers.1"])
    pipe = af.pipeline(
        stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), loss=LOSSES["smooth l1"], engine=engine
    )  # fmt: skip
    x, target = torch.randn(4, 8, 6), torch.randn(4, 8, 6)
    for laid in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :1].expand(4, 8, 6), x.repeat(1, 1, 2)[..., ::2]):
        batch = {"x": laid, "target": target}
        expected_loss, expected = plain_loop(module, lambda m, each: m(each["x"]), batch, 2, LOSSES["smooth l1"])
        found_loss, found = af.value_and_grad(pipe)(pipe.init(), batch)
        torch.testing.assert_close(found_loss, expected_loss)
        close(found, expected)
