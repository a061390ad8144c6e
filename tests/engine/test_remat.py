"""Recomputation in the backward: the same bits, two forwards, and the memory predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autofunc as af
from autofunc.engine import GraphStage, Keep, capture
from autofunc.engine.partition import in_order
from autofunc.engine.residuals import recomputed
from autofunc.errors import AutofuncError
from autofunc.schedule import StageBytes
from autofunc.splitting import StageContext, follow
from stages.gpt2 import build_gpt2_model
from tests.cases import assert_same_tree, make_case
from tests.laws.test_memory import check_bytes


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("remat", ["layer", "stage"])
@pytest.mark.parametrize(
    ("model_name", "name"),
    [
        ("gpt2", "zb_h1"),
        ("mlp", "zbv"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [("gpt2", "1f1b"), ("gpt2", "zbv"), ("mlp", "1f1b"), ("mlp", "zb_h1")]
        ),
    ],
)
def test_the_same_bits(model_name: str, name: str, remat: str, engine: str) -> None:
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    model, stages, loss, batch = make_case(model_name, s.num_stages, 8)
    full = model.init(seed=7)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(full, batch, (3, 5))
    pipe = af.pipeline(stages, s, loss=loss, engine=engine, remat=remat)
    found_loss, found = af.value_and_grad(pipe)(full, batch, (3, 5))
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


class Counter(TorchDispatchMode):
    """Counts calls of one operator."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target, self.calls = target, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is self.target
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize(("remat", "forwards"), [(None, 1), ("layer", 2), ("stage", 2)])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_two_forwards_a_microbatch(name: str, remat: str | None, forwards: int, engine: str) -> None:
    """GELU runs once a block and forward; splitting the backward adds none."""
    s = af.schedule.build(name, num_ranks=2, num_microbatches=3)
    _, stages, loss, batch = make_case("gpt2", 2, 6)
    pipe = af.pipeline(stages, s, loss=loss, engine=engine, remat=remat)
    params = pipe.init()
    step = af.value_and_grad(pipe)
    step(params, batch)
    with Counter(torch.ops.aten.gelu.default) as counter:
        step(params, batch)
    blocks, microbatches = 4, 3
    assert counter.calls == forwards * blocks * microbatches


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("zb_h1", "layer"),
        ("zbv", "stage"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [("1f1b", "layer"), ("1f1b", "stage"), ("zb_h1", "stage"), ("zbv", "layer")]
        ),
    ],
)
def test_measured_bytes_equal_the_simulators(name: str, remat: str) -> None:
    s = af.schedule.build(name, num_ranks=3, num_microbatches=5)
    _, stages, loss, batch = make_case("gpt2", s.num_stages, 10)
    pipe = af.pipeline(stages, s, loss=loss, remat=remat)
    check_bytes(pipe, pipe.init(), batch, (3, 5))


def two_blocks(**options: Any) -> tuple[Any, StageContext]:
    """A stage of two blocks, captured."""
    model = build_gpt2_model(vocab_size=16, n_positions=8, n_embd=32, n_layer=4, n_head=4, **options)
    stages = af.split(model, ["h.1", "h.3"])
    ids = torch.randint(0, 16, (2, 8))
    microbatch = {"input_ids": ids, "labels": ids, "key": af.random.make_key(0)}
    context = follow(stages, {}, microbatch, af.losses.causal_lm)[0][1]
    return capture(context), context


def held(bytes_: StageBytes) -> tuple[int, int]:
    """Return the bytes that F keeps, and that I keeps."""
    x = bytes_.outputs[0]
    weight = len(bytes_.weight_inputs) + len(bytes_.weight_cotangents) + len(bytes_.weight_input_grads)
    return bytes_.residuals + x * len(bytes_.kept_inputs), bytes_.weight_residuals + x * weight


def test_kept_values_by_choice() -> None:
    """In units of one activation, a GPT-2 block keeps 16 after F; the norms' statistics come on top."""
    joint, context = two_blocks()
    x = joint.returned.boundary.num_bytes
    after = {keep: held(GraphStage(joint, context, keep).bytes) for keep in map(Keep, (None, "cheap", "layer", "stage"))}
    assert after[Keep()][0] // x == 2 * 16
    assert after[Keep("cheap")][0] // x == 2 * 10, "norms and GELU are made again"
    assert after[Keep("layer")] == (2 * x, 2 * 16 * x)
    assert after[Keep("stage")] == (x, 2 * 16 * x)


def test_early_weight_gradients_free_memory() -> None:
    joint, context = two_blocks()
    after_i = [held(GraphStage(joint, context, Keep(None, early)).bytes)[1] for early in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert after_i == sorted(after_i, reverse=True) and after_i[-1] == 0
    assert after_i[2] <= 0.6 * held(GraphStage(joint, context).bytes)[0]


def test_compiled_code_recomputes_dropout_masks() -> None:
    """With dropout, compiled pieces keep only the values that dropout adds: no mask."""
    joint, context = two_blocks(resid_pdrop=0.5)
    plain, plain_context = two_blocks()
    assert held(GraphStage(joint, context, compiled=True).bytes) == held(GraphStage(plain, plain_context).bytes)
    again = recomputed(joint, Keep(), compiled=True)
    assert any("arange" in str(node.target) for node in again), "the counter of the hash"


def test_operators_that_run_one_by_one_keep_dropout_masks() -> None:
    """A byte an element for each of the two masks of a block. Recomputing makes them again."""
    joint, context = two_blocks(resid_pdrop=0.5)
    plain, plain_context = two_blocks()
    x = joint.returned.boundary.num_bytes
    mask = x // joint.cotangents[0].meta["val"].element_size()
    kept, without = held(GraphStage(joint, context).bytes), held(GraphStage(plain, plain_context).bytes)
    assert kept[0] == without[0] + 2 * 2 * mask
    backward = in_order(GraphStage(joint, context).pieces.backward, list(joint.graph.nodes))
    assert not any("arange" in str(node.target) for node in backward), "no hash"
    for keep in map(Keep, ("cheap", "layer", "stage")):
        assert held(GraphStage(joint, context, keep).bytes)[0] == held(GraphStage(plain, plain_context, keep).bytes)[0]


# --- "auto" -------------------------------------------------------------------------------------------------------


def peak(remat: str | None, name: str, budget: int | None = None) -> tuple[list[int], Any]:
    s = af.schedule.build(name, num_ranks=2, num_microbatches=6)
    _, stages, loss, batch = make_case("gpt2", 2, 12)
    pipe = af.pipeline(stages, s, loss=loss, remat=remat, memory_budget=budget)
    params = pipe.init(seed=3)
    _, grads = af.value_and_grad(pipe)(params, batch, (1, 2))
    return [max(row) for row in pipe.measure_bytes(params, batch, (1, 2))], grads


@pytest.mark.parametrize("name", ["zb_h2", pytest.param("1f1b", marks=pytest.mark.full)])
def test_auto_stays_within_the_budget(name: str) -> None:
    most, expected = peak(None, name)
    least, _ = peak("stage", name)
    assert max(least) < max(most)
    for part in (1.0, 0.6, 0.2):
        budget = int(max(least) + part * (max(most) - max(least)))
        found, grads = peak("auto", name, budget)
        assert max(found) <= budget
        assert_same_tree(expected, grads)
    assert peak("auto", name, 10 * max(most))[0] == most, "with room, nothing is computed again"


def test_a_budget_too_small_for_any_choice() -> None:
    with pytest.raises(AutofuncError, match=r"memory_budget=1,000 bytes: rank 0 .* keeps at least [\d,]+ bytes alive"):
        peak("auto", "1f1b", 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "layers"}, "unknown remat 'layers': did you mean layer"),
        ({"remat": "auto"}, '"auto" needs the bytes'),
        ({"memory_budget": 10}, '"auto" needs the bytes'),
        ({"remat": "auto", "memory_budget": -1}, "expected a number of bytes"),
        ({"remat": "auto", "memory_budget": 1, "engine": "eager"}, 'needs engine="graph"'),
        ({"compile": True, "engine": "eager"}, 'needs engine="graph"'),
        ({"engine": "grph"}, "unknown engine 'grph': did you mean graph"),
    ],
)
def test_conflicting_options_are_refused(options: dict[str, Any], message: str) -> None:
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    _, stages, loss, _ = make_case("mlp", 2, 4)
    with pytest.raises(AutofuncError, match=message):
        af.pipeline(stages, s, loss=loss, **options)
