"""The law: a pipeline's loss and gradients equal the plain microbatch loop's, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.batch import split_batch
from autofunc.tree import flatten
from tests.cases import assert_same_tree, make_case, pp_mesh
from tests.pool import WorkerPool

MODELS = ["mlp", "gpt2"]
SCHEDULES = af.schedule.names()
ENGINES = ["eager", "graph"]


def check_in_memory(model_name: str, engine: str, key: Any, num_microbatches: int, ranks: Sequence[int]) -> None:
    """Check every schedule, over several numbers of ranks."""
    rows = 2 * num_microbatches
    model, _, loss, batch = make_case(model_name, 1, rows)
    full = model.init(seed=7)
    before = full.clone()
    expected_loss, expected = af.reference_value_and_grad(model, loss, num_microbatches)(full, batch, key)
    for num_ranks in ranks:
        for name in SCHEDULES:
            if name == "dualpipe_v" and num_microbatches < 2 * num_ranks:
                continue
            s = af.schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
            _, stages, _, _ = make_case(model_name, s.num_stages, rows)
            pipe = af.pipeline(stages, s, loss=loss, engine=engine)
            found_loss, found = af.value_and_grad(pipe)(pipe.place(full), batch, key)
            assert found_loss.dtype == torch.float32 and found_loss.shape == ()
            assert torch.equal(found_loss, expected_loss), (name, num_ranks)
            assert_same_tree(expected, found)
            assert torch.equal(pipe(full, batch, key), expected_loss), "forward only"
    assert_same_tree(before, full)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "key"), [(2, 5, (3, 5)), (4, 8, None)], ids=["dropout", "no dropout"]
)
def test_in_memory(model_name: str, num_ranks: int, num_microbatches: int, key: Any, engine: str) -> None:
    """Two sizes on tensors; the programs of all sizes are run on tokens (`tests/runtime/test_tokens.py`)."""
    check_in_memory(model_name, engine, key, num_microbatches, [num_ranks])


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("num_microbatches", [1, 3, 8])
def test_in_memory_in_other_sizes(model_name: str, num_microbatches: int, engine: str) -> None:
    check_in_memory(model_name, engine, (3, 5), num_microbatches, range(1, 5))


@pytest.mark.parametrize("table", [
    "0F0 0F1 0I0 0W0 0I1 0W1 \n 1F0 1I0 1F1 1W0 1I1 1W1",
    "0F0 0F1 0F2 0I0 0I1 0I2 0W0 0W1 0W2 \n 1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2",
    "0F0 0F1 0F2 0B0 0I1 0W1 0B2 \n 1F0 1F1 1I0 1W0 1B1 1F2 1B2",
])  # fmt: skip
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model_name", MODELS)
def test_split_backward_from_a_table_by_hand(model_name: str, table: str, engine: str) -> None:
    s = af.schedule.from_text(table)
    model, stages, loss, batch = make_case(model_name, 2, 2 * s.num_microbatches)
    full = model.init(seed=1)
    expected_loss, expected = af.reference_value_and_grad(model, loss, s.num_microbatches)(full, batch, (1, 1))
    found_loss, found = af.value_and_grad(af.pipeline(stages, s, loss=loss, engine=engine))(full, batch, (1, 1))
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


def test_several_stages_on_one_rank() -> None:
    s = af.schedule.from_text("0F0 2F0 0F1 2F1 2B0 0B0 2B1 0B1 \n 1F0 3F0 1F1 3F1 3B0 1B0 3B1 1B1")
    model, stages, loss, batch = make_case("gpt2", 4, 4)
    full = model.init(seed=1)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(full, batch, (1, 1))
    found_loss, found = af.value_and_grad(af.pipeline(stages, s, loss=loss))(full, batch, (1, 1))
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


def test_calling_twice_gives_the_same() -> None:
    model, stages, loss, batch = make_case("gpt2", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    step = af.value_and_grad(af.pipeline(stages, s, loss=loss))
    full = model.init()
    first_loss, first = step(full, batch, (0, 1))
    second_loss, second = step(full, batch, (0, 1))
    assert torch.equal(first_loss, second_loss)
    assert_same_tree(first, second)
    other_loss, _ = step(full, batch, (0, 2))
    assert not torch.equal(first_loss, other_loss), "another step draws another dropout"


# --- on processes -------------------------------------------------------------------------------------------------


def run_on_gloo(model_name: str, schedule_name: str, num_ranks: int, num_microbatches: int, key: Any, engine: str) -> None:
    """Compare with the oracle, on each process."""
    rows = 2 * num_microbatches
    mesh = pp_mesh(num_ranks)
    s = af.schedule.build(schedule_name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    model, stages, loss, batch = make_case(model_name, s.num_stages, rows)
    pipe = af.pipeline(stages, s, loss=loss, mesh=mesh, engine=engine)
    full = model.init(seed=7)
    params = pipe.init(seed=7)
    assert_same_tree(pipe.place(full), params)
    assert_same_tree(full, pipe.gather(params))
    expected_loss, expected = af.reference_value_and_grad(model, loss, num_microbatches)(full, batch, key)
    for _ in range(2):
        found_loss, found = af.value_and_grad(pipe)(params, batch, key)
        assert torch.equal(found_loss, expected_loss)
        assert_same_tree(pipe.place(expected), found)
        assert_same_tree(expected, pipe.gather(found))
    assert torch.equal(pipe(params, batch, key), expected_loss)
    outputs = pipe.forward(params, batch)
    assert (outputs is not None) == (mesh.get_local_rank("pp") == s.placement[-1])
    rows_in_order = torch.cat([model(full, piece) for piece in split_batch(batch, num_microbatches)])
    assert torch.equal(pipe.forward(params, batch, gather="all"), rows_in_order)


@pytest.mark.parametrize(
    ("model_name", "schedule_name", "num_ranks", "num_microbatches", "key", "engine"),
    [
        ("mlp", "gpipe", 2, 1, None, "eager"),
        ("mlp", "1f1b", 4, 2, None, "graph"),
        ("gpt2", "1f1b", 2, 8, (3, 5), "graph"),
        ("gpt2", "zb_h1", 4, 8, (3, 5), "eager"),
        ("gpt2", "zbv", 4, 8, (3, 5), "graph"),
        ("gpt2", "dualpipe_v", 2, 5, (3, 5), "eager"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                ("mlp", "1f1b", 2, 3, (3, 5), "eager"),
                ("gpt2", "gpipe", 4, 5, (3, 5), "graph"),
                ("gpt2", "1f1b", 4, 8, None, "eager"),
                ("gpt2", "1f1b", 4, 12, (3, 5), "graph"),
                ("gpt2", "interleaved_1f1b", 2, 5, (3, 5), "graph"),
                ("mlp", "interleaved_1f1b", 4, 8, None, "eager"),
                ("gpt2", "looped_bfs", 4, 3, None, "graph"),
                ("gpt2", "zb_h1", 4, 8, (3, 5), "graph"),
                ("mlp", "zb_h2", 4, 9, None, "graph"),
                ("gpt2", "interleaved_zb", 2, 5, (3, 5), "eager"),
                ("mlp", "zbv", 2, 3, None, "eager"),
                ("mlp", "v_half", 4, 6, None, "graph"),
                ("gpt2", "v_min", 4, 7, None, "eager"),
                ("gpt2", "dualpipe_v", 2, 5, (3, 5), "graph"),
            ]
        ),
    ],
)
def test_on_gloo(
    workers: WorkerPool, model_name: str, schedule_name: str, num_ranks: int, num_microbatches: int, key: Any, engine: str
) -> None:
    workers.run(run_on_gloo, model_name, schedule_name, num_ranks, num_microbatches, key, engine)


def profile_on_gloo() -> list[float]:
    """Return the timeline of all ranks, as each process gets it."""
    _, stages, loss, batch = make_case("gpt2", 2, 8)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    pipe = af.pipeline(stages, s, loss=loss, mesh=pp_mesh(2))
    timeline = pipe.profile(pipe.init(), batch, steps=1)
    sends = [(a, float(end)) for a, end in zip(timeline.schedule[0], timeline.end[0], strict=True) if a.kind.name == "F"]
    reads = {
        a.microbatch: float(end) for a, end in zip(timeline.schedule[1], timeline.end[1], strict=True) if a.kind.name == "F"
    }
    assert all(made < reads[action.microbatch] for action, made in sends), "what is read was made before"
    return [float(row.sum()) for row in timeline.start]


def test_a_profile_holds_all_ranks_on_every_process(workers: WorkerPool) -> None:
    first, *others = workers.run(profile_on_gloo)[:2]
    assert all(other == first for other in others)


def train_on_gloo(num_ranks: int, steps: int) -> dict[str, Any]:
    """Run several updates; return losses, and the digest of this rank's copy of the tied weight."""
    _, stages, loss, batch = make_case("gpt2", num_ranks, 4)
    s = af.schedule.build("1f1b", num_ranks=num_ranks, num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=loss, mesh=pp_mesh(num_ranks))
    params = pipe.init(seed=0)
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-2)
    state = optimizer.init(params)
    losses = []
    for step in range(steps):
        value, grads = af.value_and_grad(pipe)(params, batch, (0, step))
        params, state = optimizer.update(grads, state, params)
        losses.append(value.item())
    return {"losses": losses, "wte": flatten(params).get("wte.weight")}


def test_copies_of_a_tied_weight_stay_identical(workers: WorkerPool) -> None:
    results = workers.run(train_on_gloo, 4, 5)
    copies = [result["wte"] for result in results if result["wte"] is not None]
    assert len(copies) == 2 and torch.equal(*copies)
    assert all(result["losses"] == results[0]["losses"] for result in results)
    two_ranks = workers.run(train_on_gloo, 2, 5)
    assert two_ranks[0]["losses"] == results[0]["losses"], "any layout gives the same losses"
