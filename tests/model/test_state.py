"""Hand-written layers that keep state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import ModelError, ScheduleError
from tests.cases import assert_same_tree, squared_error

WIDTH = 4
BATCH = {"x": torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)), "y": torch.ones(8, WIDTH)}


def centred(params: Mapping[str, Any], x: Any, batch: Mapping[str, Any], state: Any, training: bool) -> tuple[Any, Any]:
    x = torch.tanh((batch["x"] if x is None else x) @ params["weight"])
    mean = x.mean(0) if training else state["mean"]
    return x - mean, {"mean": 0.9 * state["mean"] + 0.1 * mean, "inner": {"steps": state["inner"]["steps"] + 1}}


def state_of(key: Any) -> Any:
    return {"mean": key.zeros("mean", (WIDTH,)), "inner": {"steps": torch.zeros((), dtype=torch.int64)}}


def layer(apply: Any = centred) -> af.Layer:
    return af.Layer(lambda key: {"weight": key.normal("weight", (WIDTH, WIDTH))}, apply, state_of)


def plain() -> af.Layer:
    return af.Layer(
        lambda key: {"weight": key.normal("weight", (WIDTH, WIDTH))}, lambda params, x, batch: x @ params["weight"]
    )


def build(apply: Any = centred) -> af.Model:
    return af.Model({"a": layer(), "b": plain(), "c": layer(apply), "d": plain()})


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_equal_to_the_oracle(engine: str, name: str) -> None:
    model = build()
    params, state = model.init(), model.init_state()
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    stages = af.split(model, list("bcd")[-(s.num_stages - 1) :])
    pipe = af.pipeline(stages, s, loss=squared_error, engine=engine)
    reference = af.reference_value_and_grad(model, squared_error, 4, has_state=True)
    for _ in range(2):
        (loss, after), grads = af.value_and_grad(pipe, has_state=True)(params, BATCH, state=state)
        (expected_loss, state), expected = reference(params, BATCH, state=state)
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)
        assert_same_tree(state, after)
    assert state["c", "inner", "steps"] == 8
    outputs = pipe.forward(params, BATCH, state=state)
    assert torch.equal(outputs, model(params, BATCH, state))
    assert torch.equal(outputs[:2], model(params, {"x": BATCH["x"][:2]}, state))  # rows do not depend on each other


def test_stages_by_hand() -> None:
    model = build()
    params, state = model.init(), model.init_state()
    x: Any = None
    for stage in af.split(model, ["b", "d"]):
        x, after = stage.apply(params, x, BATCH, state)
        assert sorted(after.keys()) == [name for name in stage.layers if name in "ac"]
    with pytest.raises(ModelError, match=r"state has no 'a.inner.steps'"):
        af.split(model, ["b"])[0].apply(params, None, BATCH)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x, state: x, r"layer 'c' has an init_state, so its apply\(params, x, batch, state, training\) returns"),
        (lambda x, state: (x, {"mean": state["mean"]}), r"layer 'c' does not return state 'inner.steps'"),
        (lambda x, state: (x, {**state, "more": x}), r"layer 'c' returns an unknown state 'more'"),
        (
            lambda x, state: (x, {**state, "mean": x}),
            r"returns state 'mean' as \(2, 4\) torch.float32, and received \(4,\)",
        ),
        (lambda x, state: (x, {**state, "mean": 1.0}), r"returns state 'mean' as float"),
    ],
)
def test_what_a_layer_returns(returned: Any, message: str) -> None:
    model = build(lambda params, x, batch, state, training: returned(x, state))
    pipe = af.pipeline(
        af.split(model, ["c"]), af.schedule.build("1f1b", num_ranks=2, num_microbatches=4), loss=squared_error
    )
    with pytest.raises(ModelError, match=message):
        af.value_and_grad(pipe, has_state=True)(pipe.init(), BATCH, state=pipe.init_state())


def test_a_schedule_with_forwards_in_another_order() -> None:
    def backwards(num_ranks: int, num_microbatches: int) -> list[list[str]]:
        order = range(num_microbatches - 1, -1, -1)
        return [[*(f"{stage}F{m}" for m in order), *(f"{stage}B{m}" for m in order)] for stage in range(num_ranks)]

    s = af.schedule.build(backwards, num_ranks=2, num_microbatches=2)
    with pytest.raises(ScheduleError, match=r"backwards does not run a stage's forwards .* keeps state \(a.inner.steps"):
        af.pipeline(af.split(build(), ["c"]), s, loss=squared_error)


def test_a_name_for_a_parameter_and_state() -> None:
    with pytest.raises(ModelError, match=r"'a.weight' is both a parameter and state"):
        made = af.Model({"a": af.Layer(plain().init, centred, lambda key: {"weight": torch.zeros(1)})})
        assert made.state_spec
