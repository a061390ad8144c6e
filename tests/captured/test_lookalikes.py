"""Things that look alike and differ: names, constants, masks, values of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError
from tests.captured.laws import check_layouts

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def squared(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return outputs.square().mean()


def check(module: nn.Module, points: list[str], x: Tensor = X) -> af.Model:
    layouts = [(points, "gpipe"), (points, "zb_h1")]
    return check_layouts(module, {"x": x}, layouts, loss=squared, call=lambda module, batch: module(batch["x"]))


class Rooted(nn.Module):
    """The root has a parameter named like a layer's own, and one named like a layer's part."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.w = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.pre, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.ModuleDict({"w": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.b["w"](self.a(self.pre(x)) @ self.weight) @ self.w
        return h


def test_names_of_the_root() -> None:
    check(Rooted(), ["a", "b.w"])


class Rounding(nn.Module):
    """A layer whose name may equal the value of its option."""

    def __init__(self, mode: str, zero: float) -> None:
        super().__init__()
        self.linear, self.mode, self.zero = nn.Linear(8, 8), mode, zero

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        sign = torch.copysign(torch.ones_like(h), torch.full_like(h, self.zero))
        return h * sign + torch.div(h * 3, 1.0, rounding_mode=self.mode)


def test_layers_named_like_their_options_and_signed_zeros() -> None:
    floor, trunc = Rounding("floor", 0.0), Rounding("trunc", 0.0)
    named = nn.Sequential()
    for name, part in (("first", nn.Linear(8, 8)), ("floor", floor), ("trunc", trunc), ("last", nn.Linear(8, 8))):
        named.add_module(name, part)
    layouts = [(["floor", "trunc", "last"], "gpipe")]
    check_layouts(named, {"input": X * 5}, layouts, loss=squared, call=lambda module, batch: module(batch["input"]))
    signs = nn.Sequential(*(Rounding("floor", zero) for zero in (0.0, -0.0, 0.0)))
    check_layouts(
        signs, {"input": X}, [(["1", "2"], "gpipe")], loss=squared, call=lambda module, batch: module(batch["input"])
    )


class Prefix(nn.Module):
    """A causal mask that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        mask[:, :2] = True
        y: Tensor = self.b(functional.scaled_dot_product_attention(h, h, h, attn_mask=mask))
        return y


def test_a_mask_that_is_no_longer_causal() -> None:
    check(Prefix(), ["b"], torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1)))


class Lists(nn.Module):
    """Writes to tensors in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        kept = [x * 0, x * 0 + 1]
        torch._foreach_add_(kept, [h, h])
        y: Tensor = self.c(self.b(h) + kept[0] * kept[1])
        return y


def test_lists_that_are_written_to() -> None:
    with pytest.raises(ModelError, match=r"Lists writes to a list of tensors \(aten._foreach_add_.*test_lookalikes.py"):
        af.from_module(Lists(), {"x": X})


class Parts(nn.Module):
    """Writes to one of several views that an operator makes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        with torch.no_grad():
            mask = torch.zeros(8)
            left, right = mask.chunk(2)
            left.add_(1)
            right[1:].split(1)[0].fill_(2)
        y: Tensor = self.c(h * mask)
        return y


def test_parts_that_are_written_to() -> None:
    check(Parts(), ["b", "c"])


@pytest.mark.parametrize("view", [True, False])
def test_dropout_in_place(view: bool) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            functional.dropout(h[:, :3] if view else h, 0.5, True, inplace=True)
            y: Tensor = self.b(h)
            return y

    model = af.from_module(Dropping(), {"x": X})
    params = model.init()
    assert not torch.equal(model(params, {"x": X, "key": (0, 1)}), model(params, {"x": X}))


def test_current_values_of_buffers_are_used() -> None:
    """For batches of every size, including sizes captured before."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) * self.scale
            return y

    module = nn.Sequential(Scaled(), Scaled())
    model = af.from_module(module, {"input": X})
    params = model.init()
    assert torch.equal(model(params, {"input": X}), module(X))
    module[0].scale.mul_(2)
    expected = module(X)
    assert torch.equal(model(params, {"input": X}), expected)
    torch.testing.assert_close(model(params, {"input": X[:2]}), expected[:2], rtol=0, atol=1e-6)


def test_equal_values_of_other_types() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, flag: Any) -> Tensor:
            h = self.a(x)
            y: Tensor = self.b(h * 2 if flag is True else h)
            return y

    module = Flagged()
    model = af.from_module(module, {"x": X, "flag": True})
    params = model.init()
    for flag in (True, 1, 1.0):
        assert torch.equal(model(params, {"x": X, "flag": flag}), module(X, flag))


def test_names_that_are_patterns_and_one_called_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.input = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)
            self.parts = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
            self.parts["a[0]"].bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.parts["b"](self.parts["a[0]"](self.input((x * self.gain).tanh())))
            return y

    model = check(Named(), ["input", "parts.b"])
    assert not model.is_trainable("parts.a[0].bias") and model.is_trainable("parts.a[0].weight")
