"""Modules around modules, like libraries' adapters and hooks: the inner parts run, train and keep their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import autofunc as af
from autofunc import tree
from tests.captured.laws import check_layouts

WIDTH, WORDS = 8, 12
IDS = torch.randint(WORDS, (4, 5), generator=torch.Generator().manual_seed(0))
BATCH = {"ids": IDS, "labels": IDS.flip(0)}
LAYOUTS = [(["layers.1", "layers.2"], "zb_h1")]


class Kept:
    """Keys that layers add to, like a cache; here forward begins with one."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys

    def update(self, number: int, new: Tensor) -> Tensor:
        self.keys[number] = torch.cat([self.keys[number], new], 1)
        return self.keys[number]


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.q, self.v, self.out = number, *(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        values = self.v(x)
        if kept is not None:
            values = kept.update(self.number, values)
        weights = (self.q(x) @ values.transpose(1, 2)).softmax(-1)
        y: Tensor = x + self.out(weights @ values)
        return y


class Base(nn.Module):
    """A model that reaches its layers through a slice, and computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList(map(Block, range(3)))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(
        self,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        embedded: Tensor | None = None,
        kept: Kept | None = None,
    ) -> dict[str, Tensor]:
        h = self.embed(ids) if embedded is None else embedded
        for layer in self.layers[: len(self.layers)]:
            h = layer(h, kept)
        logits = self.head(h)
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Wrapper(nn.Module):
    """Looks up foreign attributes in the module it wraps; one part has two names."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.words = base.embed
        self.prompt = nn.Embedding(3, WIDTH)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)


class Prompted(Wrapper):
    """Learns a prompt before the words."""

    def forward(self, ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        before = self.prompt.weight.expand(ids.shape[0], -1, -1)
        ignored = torch.full(before.shape[:2], -100)
        return self.base(embedded=torch.cat([before, self.words(ids)], 1), labels=torch.cat([ignored, labels], 1), **kwargs)


class Prefixed(Wrapper):
    """Learns keys that each layer finds in the cache."""

    def forward(self, ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        before = self.prompt(torch.arange(3)).expand(ids.shape[0], -1, -1)
        return self.base(ids, labels, kept=Kept([before] * len(self.layers)), **kwargs)


class Forwarding(Wrapper):
    """Runs parts of the wrapped module by names that are not registered."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = self.embed(ids) + self.prompt.weight.sum(0)
        for layer in self.layers:
            h = layer(h)
        return functional.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("wrapper", [Prompted, Prefixed, Forwarding])
def test_around_a_frozen_model(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = check_layouts(wrapper(Base()), BATCH, LAYOUTS)
    places = model.specialise().cut_points
    assert {f"base.layers.{number}.out" for number in range(3)} <= places.start.keys()
    assert not [name for name in places.start if "slice" in name]
    assert [path for path in model.used if model.is_trainable(path)] == ["prompt.weight"]


def test_checks_with_a_given_cache() -> None:
    torch.manual_seed(0)
    report = af.check(Prefixed(Base()), BATCH)
    assert report.ok, report


def test_slices_of_sequences_and_slices_of_slices() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
            self.listed = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.again = self.parts[0]

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.parts[1:](self.again(x).tanh())
            for part in self.listed[1:][::2]:
                h = part(h.tanh())
            return self.listed[-2](h).square().mean()

    module = Sliced()
    module.listed[0].requires_grad_(False)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    model = check_layouts(module, {"x": x}, [(["parts.2", "listed.1", "listed.3"], "gpipe")])
    assert model.specialise().cut_points.refused["listed.0"] == "is not run"


class Adapted(nn.Module):
    """A linear layer plus a low-rank part, with learnt column norms."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)})
        self.up = nn.ModuleDict({"default": nn.Linear(2, WIDTH, bias=False)})
        self.dropout = nn.ModuleDict({"default": nn.Dropout(0.0)})
        self.lengths = nn.ParameterDict({"default": base.weight.norm(dim=1)})
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down["default"], self.up["default"]
        norm = (self.base.weight + self.scale * (up.weight @ down.weight)).norm(dim=1).detach()
        beside = up(down(self.dropout["default"](x))) * self.scale
        y: Tensor = (self.base(x) - self.base.bias + beside) * (self.lengths["default"] / norm) + self.base.bias
        return y


def adapted() -> Base:
    torch.manual_seed(0)
    base = Base().requires_grad_(False)
    for layer in base.layers:
        layer.q, layer.v = Adapted(layer.q), Adapted(layer.v)
    return base


def test_low_rank_parts_and_learnt_norms() -> None:
    base = adapted()
    model = check_layouts(base, BATCH, [(["layers.1", "layers.2.v.up"], "zb_h1")])  # the one part that `up` holds is run
    trained = [path for path in model.used if model.is_trainable(path)]
    assert len(trained) == 24 and "layers.0.q.scale" in trained


def with_hook(part: nn.Module) -> None:
    """Replace a part's forward, as `accelerate` does."""
    old = part.forward

    def forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args = tree.map_leaves(lambda leaf: leaf.to("cpu") if isinstance(leaf, Tensor) else leaf, args)
        return old(*args, **kwargs)

    vars(part)["_old_forward"] = old
    vars(part)["forward"] = update_wrapper(partial(forward, part), old)


def test_replaced_forwards() -> None:
    base = adapted()
    for part in (base, *base.layers, base.layers[0].q):
        with_hook(part)
    model = check_layouts(base, BATCH, LAYOUTS)
    assert model.notes == (
        "the module itself, layers.0, layers.0.q and 2 more run forwards that replace those of their classes, as "
        "accelerate's hooks do: their tensor operations are captured, any other effect happens once",
    )
    assert af.check(base, BATCH).ok


def test_compiled_parts() -> None:
    base = adapted()
    for name, layer in list(base.layers.named_children()):
        base.layers.register_module(name, torch.compile(layer))

    def plainly(module: nn.Module, batch: Mapping[str, Any]) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return module(**batch)

    model = check_layouts(base, BATCH, LAYOUTS, call=plainly)
    assert model.notes == (
        "torch.compile around layers.0, layers.1, layers.2 is dropped: pass compile=True to af.pipeline instead",
    )
    assert {"layers.0", "layers.1", "layers.2"} <= set(model.layers)
    assert af.check(base, BATCH).ok


def test_compiled_parts_of_an_empty_module() -> None:
    module = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH, device="meta"))), nn.Linear(WIDTH, 1))
    before = dict(module.named_parameters())
    model = af.from_module(module, {"input": torch.zeros(4, WIDTH)})
    made = tree.flatten(model.init(seed=0))
    assert not made["0._orig_mod.0.weight"].is_meta and made["0._orig_mod.0.weight"].isfinite().all()
    after = dict(module.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is leaf for name, leaf in before.items())


def test_recomputed_activations() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x.square().mean()

    module = Again()
    af.from_module(module, {"x": torch.ones(4, WIDTH)}, verify=True)
    assert module.layers[0][1].p == 0.5
