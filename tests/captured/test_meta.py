"""Modules without weights: planned, and initialised layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autofunc as af
from autofunc import tree
from autofunc.errors import ModelError
from tests.captured.zoo import ZOO
from tests.cases import assert_same_tree

BUILDERS = {"meta": lambda: torch.device("meta"), "empty_weights": af.empty_weights}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, "meta") for name in ("gpt2", "gemma", "mixtral", "t5")),
        *((name, "empty_weights") for name in ("llama", "gpt_neox", "bert", "vit")),
        *(pytest.param(name, "empty_weights", marks=pytest.mark.full) for name in ("gpt2", "gemma", "mixtral", "t5")),
        *(pytest.param(name, "meta", marks=pytest.mark.full) for name in ("llama", "gpt_neox", "bert", "vit")),
    ],
)
def test_like_the_real_module(name: str, where: str) -> None:
    """Same shapes, ties and buffers; weights with the same statistics; the same outputs on the real weights."""
    build, batch = ZOO[name]
    real = build()
    with BUILDERS[where]():
        empty = build()
    model, expected = af.from_module(empty, batch()), af.from_module(real, batch())
    assert list(model.layers) == list(expected.layers) and model.ties == expected.ties
    found, like = tree.flatten(model.init(seed=1)), tree.flatten(expected.init())
    assert found.keys() == like.keys()
    for path, leaf in like.items():
        assert found[path].shape == leaf.shape and not found[path].is_meta
        if leaf.numel() >= 256:
            assert torch.isclose(found[path].std(), leaf.std(), rtol=0.25, atol=1e-6), path
            assert abs(found[path].mean() - leaf.mean()) < 0.2 * leaf.std() + 1e-6, path
        else:
            assert found[path].isfinite().all()
    assert torch.equal(model(expected.init(), batch()).loss, expected(expected.init(), batch()).loss)
    assert all(leaf.is_meta for leaf in empty.parameters() if where == "meta")


def test_the_layout_does_not_matter() -> None:
    build, batch = ZOO["gpt2"]
    with torch.device("meta"):
        model = af.from_module(build(), batch())
    s = af.schedule.build("1f1b", num_ranks=3, num_microbatches=2)
    pipe = af.pipeline(af.split(model, 3), s)
    assert_same_tree(model.init(seed=3), pipe.init(seed=3))
    some = model.init_paths(["transformer.h.2.mlp.c_proj.weight"], 3, "cpu")
    assert torch.equal(*some.values(), model.init(seed=3)["transformer", "h", "2", "mlp", "c_proj", "weight"])
    other = model.init(seed=4)["transformer", "wpe", "weight"]
    assert not torch.equal(other, model.init(seed=3)["transformer", "wpe", "weight"])


class Scale(nn.Module):
    """A parameter and a buffer that only the constructor fills."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.factor = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.table) * self.factor


def test_values_that_cannot_be_rebuilt() -> None:
    x = {"x": torch.randn(2, 4)}
    with torch.device("meta"):
        lost = Scale()
    with pytest.raises(ModelError, match=r"the buffer 'table' of Scale is on the meta device.*af.empty_weights"):
        af.from_module(lost, x)
    with af.empty_weights():
        kept = Scale()
    assert kept.linear.weight.is_meta and not kept.table.is_meta and not kept.factor.is_meta
    assert torch.equal(af.from_module(kept, x).init()["factor"], kept.factor)
    lost.table = torch.arange(4.0)
    with pytest.raises(ModelError, match=r"Scale \(the module itself\) is on the meta device.*'factor'"):
        af.from_module(lost, x).init()


def test_torch_attention() -> None:
    with torch.device("meta"):
        module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = af.from_module(module, {"src": torch.zeros(2, 4, 8)})
    params = model.init(seed=0)
    assert all(leaf.isfinite().all() for leaf in tree.flatten(params).values())
    assert params["self_attn", "in_proj_weight"].std() > 0.1


def piped(model: af.Model) -> af.Pipeline:
    return af.pipeline(af.split(model), af.schedule.build("gpipe", num_ranks=1, num_microbatches=1))


def test_a_seed_without_effect_is_reported() -> None:
    x = {"x": torch.randn(2, 4)}
    model = af.from_module(Scale(), x)
    own = model.init()
    for init in (model.init, piped(model).init):
        with pytest.warns(UserWarning, match="Scale has its own weights.*seed=3 has no effect") as told:
            assert_same_tree(init(seed=3), own)
        assert told[0].filename == __file__
        assert_same_tree(init(), own)
        assert all(leaf.is_meta for leaf in tree.flatten(init(seed=3, device="meta")).values())
    assert "initial weights: Scale's own, whatever the seed" in piped(model).explain()

    function = af.from_function(lambda params, batch: batch["x"] @ params["w"], {"w": torch.ones(4, 1)}, x)
    with pytest.warns(UserWarning, match="seed=0 has no effect"):
        function.init(seed=0)


def test_a_seed_that_makes_some_weights_is_used() -> None:
    with af.empty_weights():
        module = Scale()
    model = af.from_module(module, {"x": torch.randn(2, 4)})
    first, second = model.init(seed=1), model.init(seed=2)
    assert torch.equal(first["factor"], second["factor"])
    assert not torch.equal(first["linear", "weight"], second["linear", "weight"])
    assert "Scale's own, but for 2 parameters that are made from the seed" in piped(model).explain()
    with torch.device("meta"):
        linear = nn.Linear(4, 4)
    assert "initial weights: made from the seed" in piped(af.from_module(linear, {"input": torch.randn(2, 4)})).explain()
