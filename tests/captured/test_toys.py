"""Modules of a structure that no other pipeline library takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from tests.captured.laws import check_layouts
from tests.cases import assert_same_tree

BOTH = ["1f1b", "zb_h1"]


def squared(outputs: Any, microbatch: Mapping[str, Any]) -> Tensor:
    y: Tensor = outputs["y"] if isinstance(outputs, Mapping) else getattr(outputs, "y", outputs)
    return (y - microbatch["target"]).square().mean()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))


class UNet(nn.Module):
    """Each value on the way down is used on the way up, in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)])

    def forward(self, image: Tensor) -> Tensor:
        kept = []
        for conv in self.down:
            image = functional.silu(conv(image))
            kept.append(image)
            image = functional.avg_pool2d(image, 2)
        image = self.middle(image)
        for conv in self.up:
            image = functional.interpolate(image, scale_factor=2.0, mode="nearest")
            image = functional.silu(conv(torch.cat([image, kept.pop()], 1)))
        return image


class TwoTowers(nn.Module):
    """Two inputs, two chains, one distance; both chains' results cross to the end. Returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        self.right = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        left, right = self.left(a), self.right(b)
        return {"y": self.scale * (left * right).sum(-1, keepdim=True), "towers": [left, {"right": right}]}


class Recurrent(nn.Module):
    """One weight on every stage, and layers of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(functional.linear(x, self.shared.weight, self.shared.bias)))
        return x


class InnerLoss(nn.Module):
    """A scalar loss made inside, partly from the middle; buffers, a mask written in place, a no_grad region."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0.5, 2.0, 6), persistent=False)
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = x + self.bias  # before any module runs
        h = self.first(x) * self.table
        balance = h.square().mean()
        mask = torch.zeros(6)
        mask[1:4] = 1
        mask.mul_(2)
        with torch.no_grad():
            norm = h.norm(dim=-1, keepdim=True)
        h = self.second(h * mask / norm).clone()
        h[:, 0] = 0
        return functional.mse_loss(self.third(h), target) + 0.1 * balance


@dataclass
class Scores:
    """The output of `Typed`."""

    y: Tensor
    hidden: Tensor


class Typed(nn.Module):
    """Returns a dataclass, has its own argument names, runs a module twice, and has a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.twice = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.blocks = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 4)})

    def forward(self, tokens: Tensor, *, scale: Tensor) -> Scores:
        h = self.twice(torch.relu(self.twice(self.embed(tokens).mean(1))))
        h = self.frozen(self.blocks["a"](h)) * scale
        q, k = h.chunk(2, -1)
        return Scores(self.blocks["b"](torch.cat([q * k, q], -1)), h)


@pytest.mark.parametrize("name", BOTH)
def test_skip_connections(name: str) -> None:
    batch = {"image": rows(2, 8, 8), "target": rows(2, 8, 8, seed=1)}
    layouts = [(["middle"], name), (["down.1", "middle", "up.1"], name), (["down.1", "middle", "up.0", "up.1"], name)]
    check_layouts(UNet(), batch, layouts, loss=squared, call=lambda module, mb: module(mb["image"]))


@pytest.mark.parametrize("name", BOTH)
def test_two_towers(name: str) -> None:
    batch = {"a": rows(6), "b": rows(3, seed=1), "target": rows(1, seed=2)}
    layouts = [(["right.0"], name), (["left.2", "right.0", "right.2"], name)]
    model = check_layouts(TwoTowers(), batch, layouts, loss=squared, call=lambda module, mb: module(mb["a"], mb["b"]))
    outputs = model(model.init(), batch)
    assert outputs["towers"][1]["right"].shape == (4, 5)


@pytest.mark.parametrize("name", BOTH)
def test_a_weight_on_three_stages(name: str) -> None:
    batch = {"x": rows(8), "target": rows(8, seed=1)}
    model = check_layouts(
        Recurrent(), batch, [(["blocks.1", "blocks.2"], name), (2, name), (4, name)],
        loss=squared, call=lambda module, mb: module(mb["x"]),
    )  # fmt: skip
    assert sorted(set(model.ties.values())) == ["shared.bias", "shared.weight"] and len(model.ties) == 4
    assert model.init()["shared", "weight"].shape == (8, 8)


@pytest.mark.parametrize("name", BOTH)
def test_a_loss_inside(name: str) -> None:
    batch = {"x": rows(6), "target": rows(1, seed=1)}
    check_layouts(InnerLoss(), batch, [(["second"], name), (["second", "third"], name)])


@pytest.mark.parametrize("name", BOTH)
def test_dataclass_frozen_twice(name: str) -> None:
    tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = {"ids": tokens, "scale": rows(8), "target": rows(4, seed=1)}
    model = check_layouts(
        Typed(), batch, [(["a"], name), (["a", "frozen", "b"], name)], inputs={"tokens": "ids", "scale": "scale"},
        loss=squared, call=lambda module, mb: module(mb["ids"], scale=mb["scale"]),
    )  # fmt: skip
    assert not any(path.startswith("frozen") and model.is_trainable(path) for path in model.spec)
    with pytest.raises(af.errors.SplitError, match="'twice' runs 2 times"):
        af.split(model, ["twice"])


@pytest.mark.parametrize("name", BOTH)
def test_torchs_own_layers(name: str) -> None:
    """Attention, an encoder-decoder, a recurrent layer, convolutions, operators in place."""
    batch = {"src": rows(5, 8), "tgt": rows(3, 8, seed=1), "target": rows(3, 8, seed=2)}
    transformer = nn.Transformer(8, 2, 2, 2, 16, batch_first=True, dropout=0.0)
    check_layouts(
        transformer, batch, [(["decoder.layers.0", "decoder.layers.1"], name)],
        loss=squared, call=lambda module, mb: module(mb["src"], mb["tgt"]),
    )  # fmt: skip

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.last = nn.Linear(8, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 8)

        def forward(self, src: Tensor) -> Tensor:
            h: Tensor = self.last(self.lstm(self.first(src))[0])
            return h[:, :3]

    check_layouts(
        Recurrent(), batch, [(["lstm", "last"], name)], loss=squared, call=lambda module, mb: module(mb["src"])
    )  # fmt: skip
    image = {"input": rows(1, 8, 8), "target": rows(2, seed=1)}
    convolutions = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 2)
    )  # fmt: skip
    check_layouts(
        convolutions, image, [(["1", "4"], name)], loss=squared, call=lambda module, mb: module(mb["input"])
    )  # fmt: skip


def test_dropout_does_not_depend_on_the_layout() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)) for _ in range(3)])
            self.attend = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x + functional.dropout1d(self.attend(x, x, x, need_weights=False)[0], 0.2, self.training)

    batch = {"x": rows(5, 8), "target": rows(5, 8, seed=1)}
    module = Dropping()
    model = af.from_module(module, batch)
    params = model.init()
    results = []
    for points, name in (([], "1f1b"), (["blocks.1", "attend"], "zb_h1"), (["blocks.2"], "gpipe")):
        stages = af.split(model, points)
        pipe = af.pipeline(stages, af.schedule.build(name, num_ranks=len(stages), num_microbatches=4), loss=squared)
        results.append(af.value_and_grad(pipe)(params, batch, key=(0, 1)))
        other = af.value_and_grad(pipe)(params, batch, key=(0, 2))[0]
        assert other != results[-1][0]
        assert torch.equal(pipe(params, batch), pipe(params, batch))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert_same_tree(results[0][1], grads)
    # without a key nothing is dropped, as in eval mode; in eval mode a key changes nothing
    assert torch.allclose(model(params, batch), module.eval()(batch["x"]), atol=1e-6)
    other = {name: leaf[:2] for name, leaf in batch.items()}  # a shape that was not captured in train mode
    assert not torch.equal(model(params, {**other, "key": (0, 1)}), model(params, other))
    assert not module.training
    still = af.from_module(module, batch)
    assert torch.equal(still(params, {**batch, "key": (0, 1)}), still(params, batch))


def test_other_shapes_are_captured_on_arrival() -> None:
    model = af.from_module(Recurrent(), {"x": rows(8)})
    pipe = af.pipeline(
        af.split(model, ["blocks.1"]), af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), loss=squared
    )
    params = model.init()
    for count in (2, 6):
        x = torch.randn(count, 3, 8)
        expected = torch.cat([model(params, {"x": part}) for part in x.split(count // 2)])
        assert torch.equal(pipe.forward(params, {"x": x}), expected)


def test_markers_in_a_function() -> None:
    def net(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        x = torch.tanh(batch["x"] @ params["first"]["weight"])
        skip, x = x, af.split_point(torch.relu(x @ params["second"]), "second")
        x = af.split_point({"x": x + params["bias"]}, "third")["x"]
        return x @ params["first"]["weight"].T + skip.sum(-1, keepdim=True)

    params = {"first": {"weight": torch.randn(6, 8)}, "second": torch.randn(8, 8), "bias": torch.ones(8)}
    batch = {"x": rows(6), "target": rows(6, seed=1)}
    model = af.from_function(net, params, batch)
    assert list(model.layers) == ["input", "second", "third"]
    assert model.ties == {"first.weight@third": "first.weight"}
    assert torch.equal(model(model.init(), batch), net(params, batch))
    stages = af.split(model, ["second", "third"])
    for name in BOTH:
        pipe = af.pipeline(stages, af.schedule.build(name, num_ranks=3, num_microbatches=2), loss=squared)
        loss, grads = af.value_and_grad(pipe)(model.init(), batch)
        expected_loss, expected = af.reference_value_and_grad(model, squared, 2)(model.init(), batch)
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)
