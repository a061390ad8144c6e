"""Results that pipelines of a process share: found again, bounded, and dropped with the objects they were made for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import autofunc as af
from autofunc import cache
from autofunc.cache import Cache, Identity
from tests.cases import assert_same_tree, make_case


class Thing:
    """Something that is compared by identity."""


def test_a_result_is_made_once() -> None:
    made: list[int] = []
    results = Cache(most=4)
    for _ in range(3):
        assert results.get("key", lambda: made.append(1) or "result") == "result"
    assert made == [1]


def test_errors_are_not_remembered() -> None:
    results = Cache(most=4)
    with pytest.raises(ZeroDivisionError):
        results.get("key", lambda: 1 // 0)
    assert results.get("key", lambda: 2) == 2


def test_the_least_recently_used_is_forgotten() -> None:
    results = Cache(most=2)
    for key in ("a", "b"):
        results.get(key, lambda key=key: key)
    results.get("a", lambda: "made again")
    results.get("c", lambda: "c")
    assert len(results) == 2
    assert results.get("a", lambda: "made again") == "a"
    assert results.get("b", lambda: "made again") == "made again"


def test_results_are_dropped_with_their_objects() -> None:
    results, thing = Cache(most=4), Thing()
    results.get(("deep", (Identity(thing), 1)), lambda: "of the thing")
    assert results.get(("deep", (Identity(thing), 1)), lambda: "again") == "of the thing"
    known = Identity(thing)
    del thing
    gc.collect()
    results.get("another", lambda: 0)
    assert len(results) == 1
    assert known != Identity(Thing()) and known == known


def test_a_result_may_request_others() -> None:
    results = Cache(most=4)
    assert results.get("outer", lambda: results.get("inner", lambda: 1) + 1) == 2
    assert len(results) == 2


def counted_captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from autofunc.runtime import build

    captured: list[int] = []
    capture = build.capture

    def counted(context: Any) -> Any:
        captured.append(context.stage.index)
        return capture(context)

    monkeypatch.setattr(build, "capture", counted)
    monkeypatch.setattr(cache, "shared", Cache(most=1024))
    return captured


def test_a_second_pipeline_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under another schedule, not with newly split stages, not to measure costs or evaluate a batch again."""
    captured = counted_captures(monkeypatch)
    for name, number in (("1f1b", 4), ("zb_h1", 4), ("gpipe", 4)):
        model, stages, loss, batch = make_case("gpt2", 2, 8)
        params = model.init()
        s = af.schedule.build(name, num_ranks=2, num_microbatches=number)
        pipe = af.pipeline(stages, s, loss=loss)
        expected_loss, expected = af.reference_value_and_grad(model, loss, number)(params, batch)
        found_loss, found = af.value_and_grad(pipe)(params, batch)
        assert torch.equal(found_loss, expected_loss)
        assert_same_tree(expected, found)
        pipe.costs(params, batch, steps=1)
        assert captured == [0, 1]
    pipe(params, batch)
    assert captured == [0, 1, 0, 1], "a forward by itself keeps nothing, so it is another graph"
    pipe.with_loss(lambda outputs, microbatch: outputs.mean())(params, batch)
    assert captured == [0, 1, 0, 1, 1], "the first stage does not know the loss"


@pytest.mark.parametrize("changed", ["default dtype", "microbatch", "trainable", "loss"])
def test_a_captures_inputs_are_in_its_key(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = counted_captures(monkeypatch)
    model, stages, loss, batch = make_case("mlp", 2, 8)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    af.pipeline(stages, s, loss=loss).build(batch)
    assert captured == [0, 1]
    if changed == "microbatch":
        af.pipeline(stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=4), loss=loss).build(batch)
    elif changed == "loss":
        af.pipeline(stages, s, loss=lambda outputs, mb: 2 * loss(outputs, mb)).build(batch)
    elif changed == "trainable":
        frozen = af.Model(model.layers, trainable=["*weight"])
        af.pipeline(af.split(frozen, [stages[1].layers[0]]), s, loss=loss).build(batch)
    else:
        torch.set_default_dtype(torch.float64)
        try:
            af.pipeline(stages, s, loss=loss).build(batch)
        finally:
            torch.set_default_dtype(torch.float32)
    assert captured[2:] == ([1] if changed == "loss" else [0, 1])


def test_a_module_does_not_outlive_its_model() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    alive = weakref.ref(module)
    model = af.from_module(module, {"input": torch.randn(4, 4)})
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, 2), s, loss=lambda outputs, mb: outputs.square().mean())
    af.value_and_grad(pipe)(pipe.init(), {"input": torch.randn(4, 4)})
    del module, model, pipe
    gc.collect()
    assert alive() is None


def test_the_total_weight_is_bounded() -> None:
    results = Cache(most=10, heaviest=5)
    for key in ("a", "b", "c", "d"):
        results.get(key, lambda key=key: key * 2, len)
    assert len(results) == 2 and results.weight == 4
    assert results.get("large", lambda: "x" * 9, len) == "x" * 9
    assert len(results) == 1, "the last is kept, whatever it weighs"
    results.clear()
    assert results.weight == 0


def live_bytes() -> int:
    """Return the bytes of the distinct storages of all tensors."""
    while gc.collect():
        pass
    held = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    real = (tensor for tensor in held if not tensor.is_meta and type(tensor) in (torch.Tensor, nn.Parameter))
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in real)}.values())


def graph_nodes() -> int:
    return sum(type(thing) is torch.fx.Node for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("most_nodes", "shapes", "steps", "apart"),
    [(150, 6, 12, 80), pytest.param(1500, 200, 500, 1, marks=pytest.mark.full)],
)
def test_memory_does_not_grow_with_steps_and_shapes(
    most_nodes: int, shapes: int, steps: int, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receive slots, plans and captures: their memory stops growing after a third of the shapes."""
    monkeypatch.setattr(cache, "shared", Cache(most=1024, heaviest=most_nodes))
    monkeypatch.setattr("autofunc.runtime.plans._MOST_NODES", most_nodes)
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def batch(length: int) -> dict[str, torch.Tensor]:
        return {"input": torch.ones(4, length, 16)}

    pipe = af.pipeline(
        af.split(af.from_module(net, batch(2)), 2), af.schedule.build("1f1b", num_ranks=2, num_microbatches=2),
        loss=lambda outputs, rows: outputs.square().mean(),
    )  # fmt: skip
    params = pipe.init()
    step = af.value_and_grad(pipe)
    others, nodes_of_others = live_bytes(), graph_nodes()
    held: list[tuple[int, int]] = []
    for number in range(steps):
        step(params, batch(2 + apart * max(shapes - number, 1)))  # the largest comes first, the smallest again and again
        if number in (shapes // 3, shapes - 1, steps - 1):
            held.append((live_bytes() - others, graph_nodes() - nodes_of_others))
    sent = 2 * (apart * shapes + 2) * 16 * 4  # of one microbatch of the largest shape
    assert all(0 < size <= 4 * sent + 10_000 for size, _ in held), held
    assert max(nodes for _, nodes in held) < 2 * most_nodes, held
    assert held[-1][1] < 1.5 * held[0][1] and held[-1][0] < held[0][0] + 10_000, held
