"""A forward with an argument `key`: that entry is an ordinary tensor, and the randomness key is separate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import BatchError
from autofunc.random import make_key
from tests.captured.laws import check_layouts
from tests.cases import assert_same_tree

DRAWN = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
BATCH = dict(zip(("query", "key", "value"), DRAWN, strict=True))


class Attending(nn.Module):
    """Attention as `nn.MultiheadAttention` is called, then a layer."""

    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, dropout=p, batch_first=True)
        self.drop, self.last = nn.Dropout(p), nn.Linear(8, 8)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended, _ = self.attention(self.embed(query), key, self.embed(value), need_weights=False)
        out: Tensor = self.last(self.drop(attended))
        return out


def squared(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return (outputs - microbatch["key"]).square().mean()


def piped(model: af.Model, batch: Mapping[str, Any], key: Any, engine: Any = "graph") -> tuple[Tensor, Any]:
    stages = af.split(model, ["last"])
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=squared, engine=engine)
    pipe.build(batch, key=key)
    found: tuple[Tensor, Any] = af.value_and_grad(pipe)(model.init(), batch, key=key)
    return found


def test_the_entry_is_an_argument() -> None:
    torch.manual_seed(0)
    model = check_layouts(Attending().eval(), BATCH, [(["last"], "1f1b"), (["attention", "last"], "zb_h1")], loss=squared)
    stages = af.split(model, 2)
    pipe = af.pipeline(stages, af.schedule.build("gpipe", num_ranks=2, num_microbatches=2), loss=squared)
    params = model.init()
    assert torch.allclose(pipe.forward(params, BATCH), model(params, BATCH), atol=1e-6)
    applied = stages[1].apply(params, stages[0].apply(params, None, BATCH), BATCH)
    assert torch.allclose(applied, model(params, BATCH), atol=1e-6)


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_the_randomness_key_comes_with_the_call(engine: str) -> None:
    torch.manual_seed(0)
    model = af.from_module(Attending(), BATCH, verify=True)
    loss, grads = piped(model, BATCH, (0, 1), engine)
    oracle = af.reference_value_and_grad(af.split(model, ["last"])[0].model, squared, 2)
    expected_loss, expected = oracle(model.init(), BATCH, key=(0, 1))
    assert torch.equal(loss, expected_loss)
    assert_same_tree(expected, grads)
    other, still = piped(model, BATCH, (0, 2), engine)[0], piped(model, BATCH, None, engine)[0]
    assert len({float(loss), float(other), float(still)}) == 3
    evaluated = model(model.init(), BATCH)
    assert not torch.equal(model(model.init(), {**BATCH, model.key_name: make_key(0)}), evaluated)


def test_the_entry_does_not_affect_randomness() -> None:
    """An entry of two numbers, like a randomness key, is still the entry."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)

        def forward(self, x: Tensor, key: Tensor) -> Tensor:
            h: Tensor = self.last(self.drop(self.first(x)) * key.sum())
            return h

    model = af.from_module(Scaled(), {"x": DRAWN[0, :2], "key": torch.tensor([3, 4])})
    params, twice = model.init(), torch.tensor([6, 8])
    bias = params["last", "bias"]
    one, two = (model(params, {"x": DRAWN[0, :2], "key": key}) - bias for key in (twice // 2, twice))
    assert torch.allclose(one * 2, two, atol=1e-5)


def test_named_by_inputs() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.last(self.first(x).relu())
            return h

    check_layouts(
        Other(),
        {"key": DRAWN[0]},
        [(2, "1f1b")],
        loss=squared,
        call=lambda module, each: module(each["key"]),
        inputs=["key"],
    )
    named = af.from_module(Attending(), {**BATCH, "k": DRAWN[1]}, inputs={"query": "query", "key": "k", "value": "value"})
    assert named.key_name == "key"


def test_checks_see_the_entry() -> None:
    report = af.check(Attending(), BATCH, loss=squared)
    assert not [verdict for verdict in report.verdicts if verdict.status == "fail"], str(report)


def test_without_such_an_argument_it_is_the_randomness_key() -> None:
    model = af.from_module(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"input": DRAWN[0]})
    with pytest.raises(BatchError, match="expected a pair of integers"):
        model(model.init(), {"input": DRAWN[0], "key": DRAWN[1]})
