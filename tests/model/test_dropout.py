"""`af.random.dropout(x, p)` without a batch: in a layer, in a module, and where neither says what the key is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autofunc as af
from autofunc.errors import AutofuncError
from tests.cases import assert_same_tree

BATCH = {"x": torch.linspace(-1, 1, 96).view(8, 12)}
KEY = (1, 2)


def loss(y: Tensor, batch: Mapping[str, Any]) -> Tensor:
    return y.square().mean()


def model_of(*applies: Any) -> af.Model:
    init = lambda key: {"weight": key.normal("weight", (12, 12), std=0.4)}  # noqa: E731
    return af.Model({f"block.{number}": af.Layer(init, apply) for number, apply in enumerate(applies)})


def by_itself(params: Any, x: Any, batch: Any) -> Tensor:
    x = af.random.dropout(batch["x"] if x is None else x, 0.5)
    return af.random.dropout(torch.tanh(x @ params["weight"]), 0.25)


def named(layer: str) -> Any:
    def apply(params: Any, x: Any, batch: Any) -> Tensor:
        x = af.random.dropout(batch["x"] if x is None else x, 0.5, batch, f"{layer}#1")
        return af.random.dropout(torch.tanh(x @ params["weight"]), 0.25, batch, f"{layer}#2")

    return apply


def test_in_a_layer_it_is_the_layers() -> None:
    """The same bits as with names, in every layout; equal layers drop other elements."""
    model, other = model_of(*[by_itself] * 4), model_of(*(named(f"block.{number}") for number in range(4)))
    params = model.init(seed=0)
    expected = af.reference_value_and_grad(other, loss, 4)(params, BATCH, KEY)
    found = af.reference_value_and_grad(model, loss, 4)(params, BATCH, KEY)
    assert torch.equal(found[0], expected[0])
    assert_same_tree(found[1], expected[1])
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    for options in ({}, {"remat": "layer"}, {"engine": "eager"}, {"engine": "eager", "remat": "stage"}):
        value, grads = af.value_and_grad(af.pipeline(af.split(model, 2), s, loss=loss, **options))(params, BATCH, KEY)
        assert torch.equal(value, expected[0]), options
        assert_same_tree(grads, expected[1])
    assert torch.equal(model(params, BATCH), model_of(*[plain] * 4)(params, BATCH)), "no key, no dropout"


def plain(params: Any, x: Any, batch: Any) -> Tensor:
    return torch.tanh((batch["x"] if x is None else x) @ params["weight"])


def test_in_a_layer_with_state() -> None:
    def apply(params: Any, x: Any, batch: Any, state: Any, training: bool) -> Any:
        return af.random.dropout(batch["x"], 0.5), state

    layer = af.Layer(apply=apply, init_state=lambda key: {"count": key.zeros("count", (1,))})
    model = af.Model({"a": layer})
    y = model({}, {**BATCH, "key": KEY}, model.init_state())
    assert 0.3 < (y == 0).float().mean() < 0.7


class Dropping(nn.Module):
    """A module in which the function takes the place of `nn.Dropout`."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.first, self.second, self.drop, self.own = nn.Linear(12, 12), nn.Linear(12, 12), nn.Dropout(0.5), own

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        dropped = af.random.dropout(x, 0.5, training=self.training) if self.own else self.drop(x)
        made: Tensor = self.second(dropped)
        return made


def test_in_a_module_it_is_torchs() -> None:
    module = Dropping(own=True)
    torch.manual_seed(3)
    found = module(BATCH["x"])
    torch.manual_seed(3)
    assert torch.equal(found, module.second(nn.functional.dropout(module.first(BATCH["x"]), 0.5)))
    model = af.from_module(module, BATCH)
    params = model.init()
    one, two = (model(params, {**BATCH, "key": (0, step)}) for step in (1, 2))
    assert not torch.equal(one, two) and torch.equal(one, model(params, {**BATCH, "key": (0, 1)}))
    torch.testing.assert_close(model(params, BATCH), module.eval()(BATCH["x"]))


def checkpointed(params: Any, x: Any, batch: Any) -> Any:
    return checkpoint(lambda y: af.random.dropout(y @ params["weight"], 0.5).square(), batch["x"], use_reentrant=False)


def test_where_nobody_knows_the_key_it_is_refused() -> None:
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    pipe = af.pipeline(af.split(model_of(checkpointed)), s, loss=loss, engine="eager")
    with pytest.raises(AutofuncError, match=r"while gradients are computed.*dropout\(x, p, batch, name\)"):
        af.value_and_grad(pipe)(pipe.init(seed=0), BATCH, KEY)
