"""The laws of pipelines for models with adapters, and what frozen weights cost: nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.adapters import AdaptedModel
from autofunc.tree import flatten
from tests.adapters.cases import ROWS, TOKENS, bases, with_values
from tests.cases import assert_same_tree, cut_evenly, plan_of
from tests.laws.test_memory import check_bytes

WHAT: dict[str, dict[str, Any]] = {
    "layers": {"targets": ["attn.[qkv]", "mlp.*"], "rank": 3, "dropout": 0.1, "modules_to_save": ["ln_f"]},
    "llama": {"targets": ["q_proj", "*.mlp.*"], "rank": 3, "dropout": 0.1, "modules_to_save": ["lm_head", "model.norm"]},
    "gpt2": {"targets": "all-linear", "rank": 1},
}
KEY = (3, 5)


@cache
def adapted(name: str) -> tuple[AdaptedModel, Any, Any]:
    base, loss, batch = bases()[name]
    return af.lora(base, **WHAT[name]), loss, batch


@pytest.mark.parametrize("name", WHAT)
def test_pipelines_equal_the_plain_loop(name: str) -> None:
    model, loss, batch = adapted(name)
    full, saved = with_values(model), tuple(f"{part}." for part in WHAT[name].get("modules_to_save", []))
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(full, batch, KEY)
    wanted = {path for path in model.spec if ".lora_" in path or path.startswith(saved)}
    assert set(flatten(expected)) == wanted, "the base is frozen"
    assert all(grad.abs().max() > 0 for grad in flatten(expected).values())
    for schedule in ("gpipe", "1f1b", "zb_h1"):
        for engine in ("graph", "eager") if name == "layers" or schedule == "zb_h1" else ("graph",):
            s = af.schedule.build(schedule, num_ranks=2, num_microbatches=2)
            pipe = af.pipeline(cut_evenly(model, 2), s, loss=loss, engine=engine)
            found_loss, found = af.value_and_grad(pipe)(pipe.place(full), batch, KEY)
            assert torch.equal(found_loss, expected_loss), (schedule, engine)
            assert_same_tree(expected, found)


def pipe_of(model: af.Model, loss: Any, schedule: str) -> af.Pipeline:
    return af.pipeline(cut_evenly(model, 2), af.schedule.build(schedule, num_ranks=2, num_microbatches=2), loss=loss)


def test_frozen_weights_cost_no_gradient_memory() -> None:
    """Sums of gradients are those of factors; beside x, which W would keep as A does, a rank of numbers a token is kept."""
    model, loss, batch = adapted("gpt2")
    per_microbatch = ROWS // 2 * TOKENS * WHAT["gpt2"]["rank"] * 4
    for schedule in ("1f1b", "zb_h1"):
        kept, peaks = [], []
        for each in (model.base, model):
            pipe, params = pipe_of(each, loss, schedule), with_values(each)
            check_bytes(pipe, params, batch, KEY)
            kept.append(pipe.memory(params, batch, KEY))
            peaks.append([max(found) for found in pipe.measure_bytes(params, batch, KEY)])
        for stage, full, few in zip(cut_evenly(model, 2), *kept, strict=True):
            assert few.accumulators == sum(4 * model.spec[path].numel() for path in stage.trainable_holders)
            assert few.residuals <= full.residuals + per_microbatch * len(stage.trainable_holders) // 2
        assert all(few < full for full, few in zip(*peaks, strict=True)), schedule


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_frozen_weights_cost_no_work(name: str) -> None:
    """No product is as large as a frozen weight, in any piece; W is of factors alone."""
    model, loss, batch = adapted(name)
    pipe, params = pipe_of(model, loss, "zb_h1"), with_values(model)
    shapes_of = {
        trained: {tuple(leaf.shape) for path, leaf in model.spec.items() if model.is_trainable(path) == trained}
        for trained in (True, False)
    }
    frozen = {way for shape in shapes_of[False] - shapes_of[True] if len(shape) == 2 for way in (shape, shape[::-1])}
    plan = plan_of(pipe, params, batch, KEY)
    for stage in plan.functions.values():
        made = [
            node for node in stage.joint.graph.nodes
            if node.op == "call_function" and any(word in str(node.target) for word in (".mm.", ".addmm.", ".bmm."))
        ]  # fmt: skip
        shapes = {tuple(node.meta["val"].shape) for node in made}
        assert len(made) > 10 and not shapes & frozen
        assert len(stage.pieces.backward_weight.adds) == sum(pipe.stages[stage._index].trainable)


def test_initial_factors_depend_on_seed_and_path_alone() -> None:
    model, _, batch = adapted("llama")
    whole = flatten(model.init(seed=3))
    for schedule, num_ranks in (("1f1b", 2), ("gpipe", 1)):
        s = af.schedule.build(schedule, num_ranks=num_ranks, num_microbatches=2)
        assert_same_tree(whole, flatten(af.pipeline(cut_evenly(model, num_ranks), s).init(seed=3)))
    some = model.init_paths(reversed(whole), 3, "cpu")
    assert list(some) == list(whole), "in the same order in every process, whatever the order of the paths"
    down = whole["model.layers.0.mlp.down_proj.lora_A.weight"]
    assert down.shape == (3, 24) and not torch.equal(down, whole["model.layers.1.mlp.down_proj.lora_A.weight"])
    assert 0.15 < down.abs().max() <= 24**-0.5, "uniform up to 1 / sqrt(in)"
    assert not any(leaf.any() for path, leaf in whole.items() if ".lora_B." in path)
    assert torch.equal(model(model.init(seed=3), batch)["logits"], model.base(model.base.init(), batch)["logits"])
