"""Models: names, ties, init and trainable patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages.mlp import build_mlp_model
from tests.cases import assert_same_tree


def linear(rows: int, columns: int) -> af.Layer:
    return af.Layer(
        init=lambda key: {"weight": key.normal("weight", (rows, columns))},
        apply=lambda params, x, batch: (batch["x"] if x is None else x) @ params["weight"].t(),
    )


def test_call_is_plain_composition() -> None:
    model = af.Model({"a": linear(4, 3), "b": linear(2, 4)})
    params = model.init(seed=1)
    x = torch.randn(5, 3)
    expected = x @ params["a", "weight"].t() @ params["b", "weight"].t()
    assert torch.equal(model(params, {"x": x}), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"needs apply\(params, x, batch\); a layer without parameters is af.Layer\(apply=...\)"),
        ({"init": lambda key: {}}, r"needs apply\(params, x, batch\)"),
        ({"apply": "relu"}, r"apply is str; expected a function apply\(params, x, batch\)"),
        ({"init": {"w": 1}, "apply": lambda params, x, batch: x}, r"init is dict; expected a function init\(key\)"),
    ],
)
def test_layers_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        af.Layer(**arguments)


def test_a_layer_takes_init_first() -> None:
    layer = af.Layer(lambda key: {"w": key.ones("w", (2,))}, lambda params, x, batch: batch["x"] * params["w"])
    model = af.Model({"scale": layer, "double": af.Layer(apply=lambda params, x, batch: 2 * x)})
    assert torch.equal(model(model.init(seed=0), {"x": torch.ones(2)}), torch.full((2,), 2.0))


def test_init_is_the_same_in_any_company() -> None:
    alone = af.Model({"b": linear(2, 4)}).init(seed=3)
    assert_same_tree({"b": af.Model({"a": linear(4, 3), "b": linear(2, 4)}).init(seed=3)["b"]}, alone)
    assert not torch.equal(alone["b", "weight"], af.Model({"c": linear(2, 4)}).init(seed=3)["c", "weight"])


def test_init_on_meta_allocates_nothing() -> None:
    params = build_mlp_model(hidden_features=1 << 20).init(device="meta")
    assert all(leaf.is_meta for leaf in flatten(params).values())


def test_ties_are_held_once() -> None:
    model = af.Model({"a": linear(3, 3), "b": linear(3, 3)}, ties={"b.weight": "a.weight"})
    params = model.init()
    assert list(flatten(params)) == ["a.weight"]
    x = torch.randn(2, 3)
    assert torch.equal(model(params, {"x": x}), x @ params["a", "weight"].t() @ params["a", "weight"].t())


@pytest.mark.parametrize(
    ("layers", "ties", "message"),
    [
        ({"h": linear(3, 3), "h.0": linear(3, 3)}, {}, "'h' and 'h.0' cannot both be names"),
        ({}, {}, "at least one layer"),
        ({"a": linear(3, 3), "b": linear(3, 3)}, {"b.weight": "a.wieght"}, "no such parameter; did you mean a.weight"),
        ({"a": linear(3, 3), "b": linear(3, 4)}, {"b.weight": "a.weight"}, r"shapes \(3, 4\) and \(3, 3\) differ"),
        ({"a": linear(3, 3)}, {"c.weight": "a.weight"}, "no layer's name begins this path"),
        ({"a": linear(3, 3)}, {"b.w": "c.w", "c.w": "a.weight"}, "is itself tied"),
    ],
)
def test_models_that_do_not_fit(layers: dict[str, af.Layer], ties: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        af.Model(layers, ties=ties).init()


def test_missing_parameters_are_named() -> None:
    model = af.Model({"a": linear(3, 3)})
    with pytest.raises(ModelError, match=r"params have no 'a.weight', which layer 'a' needs; did you mean a.wight"):
        model({"a": {"wight": torch.zeros(3, 3)}}, {"x": torch.zeros(1, 3)})


def loss(outputs: Any, microbatch: Any) -> Any:
    return outputs.square().mean()


def test_frozen_parameters_get_no_gradient_and_send_nothing_back() -> None:
    layers = {"a": linear(3, 3), "b": linear(3, 3), "c": linear(3, 3)}
    model = af.Model(layers, trainable=["c*", "b.weight"])
    batch = {"x": torch.randn(4, 3)}
    stages = af.split(model, ["b", "c"])
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=3, num_microbatches=2), loss=loss)
    params = pipe.init()
    found_loss, found = af.value_and_grad(pipe)(params, batch)
    assert list(flatten(found)) == ["b.weight", "c.weight"]
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(params, batch)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)
    assert "forward only" in pipe.explain()


def test_trainable_pattern_without_a_match() -> None:
    with pytest.raises(ModelError, match=r"trainable pattern 'head.' matches no parameter"):
        af.Model({"a": linear(3, 3)}, trainable=["head*"]).init()


def test_unused_parameters_get_zeros() -> None:
    model = af.Model(
        {
            "a": af.Layer(
                init=lambda key: {"used": key.ones("used", (3,)), "idle": key.ones("idle", (2,))},
                apply=lambda params, x, batch: batch["x"] * params["used"],
            )
        }
    )
    pipe = af.pipeline(af.split(model), af.schedule.build("gpipe", num_ranks=1, num_microbatches=1), loss=loss)
    _, grads = af.value_and_grad(pipe)(pipe.init(), {"x": torch.randn(2, 3)})
    assert torch.equal(grads["a", "idle"], torch.zeros(2)) and grads["a", "used"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = af.Model({"a": linear(3, 3), "b": linear(3, 3)}, ties={"b.weight": "a.weight"})
    batch = {"x": torch.randn(8, 3, dtype=dtype)}
    pipe = af.pipeline(af.split(model, ["b"]), af.schedule.build("1f1b", num_ranks=2, num_microbatches=8), loss=loss)
    params = pipe.init(dtype=dtype)
    found_loss, found = af.value_and_grad(pipe)(params, batch)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 8)(params, batch)
    assert found["a", "weight"].dtype == dtype and found_loss.dtype == torch.float32
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


def test_low_precision_gradients_accumulate_in_fp32() -> None:
    """256 + 1 is 256 in bf16: only a wider sum keeps the small contributions."""
    model = af.Model(
        {"a": af.Layer(init=lambda key: {"w": key.ones("w", (1,))}, apply=lambda p, x, batch: (batch["x"] * p["w"]).sum())}
    )
    batch = {"x": torch.tensor([256.0] + [1.0] * 63, dtype=torch.bfloat16)}
    s = af.schedule.build("gpipe", num_ranks=1, num_microbatches=64)
    pipe = af.pipeline(af.split(model), s, loss=lambda outputs, mb: (outputs, 1.0))
    _, grads = af.value_and_grad(pipe)(pipe.init(dtype=torch.bfloat16), batch)
    assert grads["a", "w"].item() == torch.tensor(319 / 64, dtype=torch.bfloat16).item()


def test_x_may_be_any_pytree() -> None:
    def first(params: Any, x: Any, batch: Any) -> Any:
        return {"hidden": batch["x"] * params["w"], "ids": batch["x"].long(), "scale": 2.0, "pair": (batch["x"], None)}

    def second(params: Any, x: Any, batch: Any) -> Any:
        return x["hidden"] * params["w"] * x["scale"] + x["ids"] + x["pair"][0]

    init = lambda key: {"w": key.normal("w", (3,))}  # noqa: E731
    model = af.Model({"a": af.Layer(apply=first, init=init), "b": af.Layer(apply=second, init=init)})
    pipe = af.pipeline(af.split(model, ["b"]), af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), loss=loss)
    params, batch = pipe.init(), {"x": torch.randn(4, 3)}
    found_loss, found = af.value_and_grad(pipe)(params, batch)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(params, batch)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)
    lines = pipe.explain().splitlines()
    assert any("x.hidden: float32 2x3, 24 bytes" in line for line in lines)
    assert any("x.ids: int64 2x3, 48 bytes a microbatch, forward only" in line for line in lines)
