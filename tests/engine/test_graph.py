"""The graph engine: what it captures and refuses, what it keeps, and when it frees it."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import autofunc as af
from autofunc import cache, installed
from autofunc.engine import GraphStage, Microbatch, capture
from autofunc.engine.graph import COMPUTATIONS
from autofunc.errors import ModelError
from autofunc.runtime import build
from autofunc.runtime.accumulate import Accumulator
from autofunc.splitting import StageContext, follow
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from tests.cases import assert_same_tree, make_case

Apply = Callable[[Any, Any, Any], Any]


class Product(torch.autograd.Function):
    """x @ w with a custom gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


CONSTANT = torch.randn(4)


def with_mask(p: Any, x: Tensor, b: Any) -> Tensor:
    mask = torch.zeros(x.shape[0], 4)
    mask[:, 1] = 2
    return (x @ p["w"]) * mask


def in_place_on_a_temporary(p: Any, x: Tensor, b: Any) -> Tensor:
    y = x @ p["w"]
    y.add_(1)
    return y * 2


def list_written_in_place(p: Any, x: Tensor, b: Any) -> Tensor:
    kept = [torch.zeros(4), torch.ones(4)]
    torch._foreach_add_(kept, 2.0)
    return (x @ p["w"]) * kept[0] + kept[1]


def written_as_out(p: Any, x: Tensor, b: Any) -> Tensor:
    made = torch.zeros_like(x)
    with torch.no_grad():
        torch.add(x, 1, out=made)
    return (x @ p["w"]) * made


def two_uses(p: Any, x: Tensor, b: Any) -> Tensor:
    return torch.tanh(x @ p["w"]) @ p["w"] + x


CAPTURED: dict[str, Apply] = {
    "custom autograd function": lambda p, x, b: Product.apply(x, p["w"]),
    "checkpoint": lambda p, x, b: checkpoint(lambda x, w: torch.tanh(x @ w), x, p["w"], use_reentrant=False),
    "mask written in place": with_mask,
    "temporary written in place": in_place_on_a_temporary,
    "list written in place": list_written_in_place,
    "temporary written as out": written_as_out,
    "weight used twice": two_uses,
    "constant from outside": lambda p, x, b: x @ p["w"] + CONSTANT,
    "constant made inside": lambda p, x, b: x @ p["w"] + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "other dtype inside": lambda p, x, b: (x.double() @ p["w"].double()).float(),
    "identity": lambda p, x, b: x,
    "unused parameter": lambda p, x, b: x * 2,
    "no gradient to the input": lambda p, x, b: x.detach() @ p["w"],
    "views and lists": lambda p, x, b: torch.cat([x, x @ p["w"]], -1)[:, 2:6].reshape(-1, 2, 2).flatten(1),
    "indices": lambda p, x, b: (x @ p["w"])[:, torch.tensor([3, 1, 0, 2])],
    "infinities": lambda p, x, b: (x @ p["w"]).masked_fill(x > 0, float("-inf")).clamp(min=-3.0),
    "several outputs of one operator": lambda p, x, b: torch.nn.functional.layer_norm(x, (4,), p["w"][0], p["w"][1]),
}


def three_layers(middle: Apply) -> tuple[af.Model, dict[str, Tensor], Callable[[Any, Any], Tensor]]:
    def init(key: Any) -> dict[str, Tensor]:
        return {"w": key.normal("w", (4, 4))}

    model = af.Model(
        {
            "first": af.Layer(init=init, apply=lambda p, x, b: b["x"] @ p["w"]),
            "middle": af.Layer(init=init, apply=middle),
            "last": af.Layer(init=init, apply=lambda p, x, b: x @ p["w"]),
        }
    )
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 4)}
    return model, batch, lambda outputs, mb: (outputs - mb["y"]).square().mean()


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_captured_stages_equal_the_oracle(name: str, schedule: str) -> None:
    model, batch, loss = three_layers(CAPTURED[name])
    params = model.init()
    expected_loss, expected = af.reference_value_and_grad(model, loss, 3)(params, batch)
    s = af.schedule.build(schedule, num_ranks=3, num_microbatches=3)
    pipe = af.pipeline(af.split(model, ["middle", "last"]), s, loss=loss, engine="graph")
    found_loss, found = af.value_and_grad(pipe)(params, batch)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


def branch(p: Any, x: Tensor, b: Any) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def writes_parameter(p: Any, x: Tensor, b: Any) -> Tensor:
    with torch.no_grad():
        p["w"].mul_(2)
    return x @ p["w"]


def writes_parameter_in_a_list(p: Any, x: Tensor, b: Any) -> Tensor:
    with torch.no_grad():
        torch._foreach_mul_([p["w"]], 2.0)
    return x @ p["w"]


def writes_parameter_as_out(p: Any, x: Tensor, b: Any) -> Tensor:
    with torch.no_grad():
        torch.mul(p["w"], 2, out=p["w"].detach())
    return x @ p["w"]


def keeps_statistics_in_a_parameter(p: Any, x: Tensor, b: Any) -> Tensor:
    with torch.no_grad():
        shifted = torch.nn.functional.batch_norm(x, p["w"][0], p["w"][1], training=True)
    return x @ p["w"] + shifted


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (branch, r"stage 1 .*reads the value of a tensor \(.*test_graph.py, line \d+: if x.sum\(\) > 0:"),
        (lambda p, x, b: x * float(x.sum().item()), r"reads the value of a tensor \(.*test_graph.py"),
        (
            writes_parameter,
            r"stage 1 .*writes to one of its inputs or parameters \(aten.mul_.Tensor; .*test_graph.py, line",
        ),
        (writes_parameter_in_a_list, r"writes to one of its inputs or parameters \(aten._foreach_mul_.*test_graph.py"),
        (writes_parameter_as_out, r"writes to one of its inputs or parameters \(aten.mul.out; .*test_graph.py"),
        (keeps_statistics_in_a_parameter, r"writes to one of its inputs or parameters \(aten.native_batch_norm"),
        (lambda p, x, b: x.add_(1) @ p["w"], r"stage 1 .*in-place operation"),
        (lambda p, x, b: torch.dropout(x, 0.5, True), r'draws from the global random generator .*engine="eager"'),
        (lambda p, x, b: x + torch.rand(4), r"draws from the global random generator \(aten.rand"),
        (lambda p, x, b: checkpoint(torch.tanh, x, use_reentrant=True), r"stage 1 .*use_reentrant=False"),
    ],
)
def test_impure_stages_are_refused(middle: Apply, message: str) -> None:
    model, batch, loss = three_layers(middle)
    s = af.schedule.build("1f1b", num_ranks=3, num_microbatches=2)
    pipe = af.pipeline(af.split(model, ["middle", "last"]), s, loss=loss, engine="graph")
    with pytest.raises(ModelError, match=message):
        af.value_and_grad(pipe)(model.init(), batch)


SEEN: list[Any] = []
STATE = torch.zeros(4)


def rebinds_a_global(p: Any, x: Tensor, b: Any) -> Tensor:
    global CONSTANT
    CONSTANT = CONSTANT + 1
    return x @ p["w"]


def fills_a_global(p: Any, x: Tensor, b: Any) -> Tensor:
    SEEN.append(x.shape)
    return x @ p["w"]


def writes_a_tensor_from_outside(p: Any, x: Tensor, b: Any) -> Tensor:
    STATE.add_(1)
    return x @ p["w"]


def test_caches_of_libraries_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed libraries in any folder, recognised by pip's metadata beside them."""
    (tmp_path / "keeps_a_cache.py").write_text(
        "CACHE = {}\n\ndef double(x):\n    CACHE[len(CACHE)] = 1\n    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    double = importlib.import_module("keeps_a_cache").double

    def step(p: Any, x: Tensor, b: Any) -> Tensor:
        return double(x @ p["w"])

    test_impure_stages_are_refused(step, "changes the global 'CACHE' of keeps_a_cache")
    (tmp_path / "keeps_a_cache-1.0.dist-info").mkdir()
    installed.holds_packages.cache_clear()
    model, batch, loss = three_layers(step)
    s = af.schedule.build("1f1b", num_ranks=3, num_microbatches=2)
    pipe = af.pipeline(af.split(model, ["middle", "last"]), s, loss=loss)
    assert af.value_and_grad(pipe)(model.init(), batch)[0].isfinite()


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (rebinds_a_global, r"stage 1 .*changes the global 'CONSTANT' of tests.engine.test_graph.*engine=\"eager\""),
        (fills_a_global, r"stage 1 .*changes the global 'SEEN'"),
        (writes_a_tensor_from_outside, r"stage 1 .*writes to a tensor from outside .*line \d+: STATE.add_\(1\)"),
    ],
)
def test_state_outside_is_refused(middle: Apply, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CONSTANT", CONSTANT)  # undone at the end
    test_impure_stages_are_refused(middle, message)


def test_equal_stages_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []

    def counted(context: StageContext) -> Any:
        captured.append(context.stage.index)
        return capture(context)

    monkeypatch.setattr(build, "capture", counted)
    cache.shared.clear()
    model = build_gpt2_model(vocab_size=17, n_positions=8, n_embd=8, n_layer=6, n_head=2, resid_pdrop=0.1)
    stages = af.split(model, ["h.0", "h.1", "h.2", "h.3", "h.4", "h.5"])
    ids = torch.randint(0, 17, (4, 7))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    params = model.init()
    s = af.schedule.build("zb_h1", num_ranks=7, num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=af.losses.causal_lm)
    expected_loss, expected = af.reference_value_and_grad(model, af.losses.causal_lm, 2)(params, batch)
    found_loss, found = af.value_and_grad(pipe)(params, batch)
    assert captured == [0, 1, 6], "embeddings, one of the blocks, the last block with norm, head and loss"
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)
    captured.clear()
    af.value_and_grad(pipe)(params, batch, (0, 1))
    assert captured == list(range(7)), "dropout depends on the layer's name"


def scaled(factor: Any) -> af.Layer:
    return af.Layer(init=lambda key: {"w": key.normal("w", (4, 4))}, apply=lambda p, x, b: factor * (x @ p["w"]))


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [(2.0, 2.0, True), (2.0, 3.0, False), (2, 2.0, False), (torch.ones(1), torch.ones(1), False)],
)
def test_stages_with_different_closures_differ(left: Any, right: Any, equal: bool) -> None:
    first = af.Layer(init=lambda key: {"w": key.normal("w", (4, 4))}, apply=lambda p, x, b: b["x"] @ p["w"])
    model = af.Model({"first": first, "a": scaled(left), "b": scaled(right), "last": scaled(1.0)})
    batch = {"x": torch.randn(4, 4)}
    stages = af.split(model, 4)
    _, one, other, _ = follow(stages, {}, batch, lambda out, mb: out.mean())[0]
    assert (one.fingerprint == other.fingerprint) == equal


def made(
    context: StageContext, params: dict[str, Tensor], batch: dict[str, Any]
) -> tuple[GraphStage, StageContext, dict[str, Tensor], dict[str, Any]]:
    stage = GraphStage(capture(context), context)
    stage.make(COMPUTATIONS)
    return stage, context, params, batch


def middle_stage() -> tuple[GraphStage, StageContext, dict[str, Tensor], dict[str, Any]]:
    """Return the middle of three stages of the small GPT-2."""
    model, stages, loss, batch = make_case("gpt2", 3, 4)
    params = flatten(model.init())
    return made(follow(stages, params, batch, loss)[0][1], params, batch)


def test_residuals_hold_no_parameters() -> None:
    stage, context, params, batch = middle_stage()
    leaves = context.stage.leaves(params)
    shape = context.received.values[0].shape  # type: ignore[union-attr]
    with torch.no_grad():
        _, residuals = stage.forward(stage.bind(leaves), [], [torch.randn(shape)], Microbatch.of(batch))
    storages = {value.untyped_storage().data_ptr() for value in residuals.values}
    assert not storages & {leaf.untyped_storage().data_ptr() for leaf in leaves}


def alive(references: list[Any]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_values_are_freed_at_their_last_use() -> None:
    stage, context, params, batch = middle_stage()
    shape = context.received.values[0].shape  # type: ignore[union-attr]
    bound = stage.bind(context.stage.leaves(params))
    sums = Accumulator(context.accumulator_layouts, context.device)
    with torch.no_grad():
        inputs = [torch.randn(shape)]
        given = weakref.ref(inputs[0])
        _, residuals = stage.forward(bound, [], inputs, Microbatch.of(batch))
        assert inputs == [], "the list is taken over"
        held = [weakref.ref(value) for value in residuals.values]
        cotangents = [torch.randn(shape)]
        cotangent = weakref.ref(cotangents[0])
        sent_back, weight_residuals = stage.backward_input(residuals, cotangents, sums)
        after_i = alive(held)
        assert 0 < after_i < len(held), "what only the input gradient needed is gone"
        kept = [weakref.ref(value) for value in weight_residuals.values]
        stage.backward_weight(weight_residuals, sums)
        assert alive(kept) == 0 and alive(held) == 0 and cotangent() is None
        assert given() is None and len(sent_back) == 1


def test_the_first_stage_has_no_input_gradient() -> None:
    model, stages, loss, batch = make_case("gpt2", 3, 4)
    params = flatten(model.init())
    stage = made(follow(stages, params, batch, loss)[0][0], params, batch)[0]
    assert stage.pieces.backward_input is None and stage.pieces.backward_weight is stage.pieces.backward


def test_frozen_parameters_get_no_gradient() -> None:
    model, _, loss, batch = make_case("gpt2", 2, 4)
    frozen = af.Model(model.layers, ties=model.ties, config=model.config, trainable=["h.2*", "ln_f*"])
    params = frozen.init()
    expected_loss, expected = af.reference_value_and_grad(frozen, loss, 2)(params, batch)
    for name in ("1f1b", "zb_h1"):
        s = af.schedule.build(name, num_ranks=2, num_microbatches=2)
        pipe = af.pipeline(af.split(frozen, 2), s, loss=loss, engine="graph")
        found_loss, found = af.value_and_grad(pipe)(params, batch)
        assert torch.equal(found_loss, expected_loss)
        assert_same_tree(expected, found)


def test_low_precision_accumulates_in_fp32() -> None:
    model, stages, loss, batch = make_case("gpt2", 2, 8)
    params = model.init(dtype=torch.bfloat16)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(params, batch)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    found_loss, found = af.value_and_grad(af.pipeline(stages, s, loss=loss, engine="graph"))(params, batch)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


def test_aux_is_returned() -> None:
    model, stages, loss, batch = make_case("mlp", 2, 6)

    def with_aux(outputs: Tensor, mb: Any) -> tuple[Tensor, float, dict[str, Any]]:
        return loss(outputs, mb), 1.0, {"largest": outputs.amax(), "rows": outputs.shape[0]}

    params = model.init()
    expected = af.reference_value_and_grad(model, with_aux, 3, has_aux=True)(params, batch)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=3)
    pipe = af.pipeline(stages, s, loss=with_aux, engine="graph")
    (value, aux), grads = af.value_and_grad(pipe, has_aux=True)(params, batch)
    assert torch.equal(value, expected[0][0]) and torch.equal(aux["largest"], expected[0][1]["largest"])
    assert int(aux["rows"]) == 6
    assert_same_tree(expected[1], grads)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection_does_not_stop_a_capture() -> None:
    """Anomaly detection reads the values of gradients, which a capture does not have."""
    layer = af.Layer(init=lambda key: {"weight": key.normal("weight", (3, 3))}, apply=lambda p, x, b: b["x"] @ p["weight"])
    pipe = af.pipeline(
        af.split(af.Model({"a": layer})), af.schedule.build("gpipe", num_ranks=1, num_microbatches=2),
        loss=lambda y, batch: y.square().mean(),
    )  # fmt: skip
    with torch.autograd.set_detect_anomaly(True):
        loss, _ = af.value_and_grad(pipe)(pipe.init(seed=0), {"x": torch.ones(2, 3)})
        assert torch.is_anomaly_enabled() and loss > 0
