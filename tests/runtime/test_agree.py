"""Ranks that are about to do different things report it, instead of waiting for each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import autofunc as af
from autofunc.errors import AutofuncError
from tests.cases import make_case, mesh_of, pp_mesh
from tests.pool import WorkerPool


def disagree(what: str) -> str:
    """Return this rank's error if rank 1 alone does something else."""
    mesh = pp_mesh(4)
    rank = mesh.get_local_rank("pp")
    _, stages, loss, batch = make_case("gpt2", 4, 4)
    s = af.schedule.build("1f1b", num_ranks=4, num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=loss, mesh=mesh)
    params = pipe.init()
    call: Any = af.value_and_grad(pipe)
    if what == "rows" and rank == 1:
        batch = {name: leaf.repeat(2, 1) for name, leaf in batch.items()}
    elif what == "an entry" and rank == 1:
        batch = {**batch, "temperature": 2.0}
    elif what == "mode" and rank == 1:
        call = pipe
    elif what == "precision" and rank == 1:
        torch.set_float32_matmul_precision("medium")
    elif what == "a tied weight" and rank == 3:
        params = params.double()
    try:
        call(params, batch)
    except AutofuncError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_float32_matmul_precision("highest")
    return "nothing"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "BatchError: batch.input_ids of a microbatch is int64 of shape (2, 6) on pp rank 0, and int64 of"),
        ("an entry", "BatchError: batch.temperature of a microbatch is missing on pp rank 0, and 2.0 on rank 1"),
        ("mode", "BatchError: pp rank 0 wants loss and gradients, and rank 1 wants loss; all must call the same"),
        ("precision", "BatchError: float32 matmul precision is 'highest' on pp rank 0, and 'medium' on rank 1"),
        ("a tied weight", "ModelError: parameter 'wte.weight' is float32 on pp rank 0, and float64 on rank 3"),
    ],
)  # fmt: skip
def test_every_rank_names_the_difference(workers: WorkerPool, what: str, message: str) -> None:
    for said in workers.run(disagree, what):
        assert message in said


def alone() -> str:
    """Return this rank's error if only the last rank changes its parameters' dtype, after a good step."""
    group = dist.new_group(list(range(4)), timeout=timedelta(seconds=4))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("pp",))
    model, _, _, batch = make_case("mlp", 4, 4)
    stages = af.split(model, 4)
    s = af.schedule.build("1f1b", num_ranks=4, num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=lambda outputs, mb: outputs.float().square().mean(), mesh=mesh)
    params = pipe.init()
    af.value_and_grad(pipe)(params, batch)
    if mesh.get_local_rank("pp") == 3:
        params = params.double()
    try:
        af.value_and_grad(pipe)(params, batch)
    except AutofuncError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_rank_that_arrives_alone_names_the_others(workers: WorkerPool) -> None:
    *others, last = workers.run(alone)
    assert "PeerLostError: pp rank 3 prepares a step (loss and gradients; batch.x: float32 of shape (2, 6)" in last
    assert "and rank 0, 1, 2 does not: it has run such a step before, or is gone" in last
    assert all(said.startswith("PeerLostError") for said in others)


def forgetting() -> list[int]:
    """Return how many plans this rank holds after each step; some ranks have room for more than others."""
    from autofunc.runtime import plans as module

    mesh = pp_mesh(4)
    _, stages, loss, batch = make_case("gpt2", 4, 8)
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=4, num_microbatches=2), loss=loss, mesh=mesh)
    params = pipe.init()
    held = []
    for number, rows in enumerate((8, 4, 8, 4, 8)):
        af.value_and_grad(pipe)(params, {name: leaf[:rows] for name, leaf in batch.items()})
        plan = next(iter(pipe._plans))
        if number == 0:
            nodes: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(nodes, plan.num_nodes)
            assert min(nodes) < max(nodes), "the stages differ in size"
            module._MOST_NODES = (min(nodes) + max(nodes)) // 2
        held.append(len(pipe._plans))
    return held


def test_all_ranks_forget_the_same_plans(workers: WorkerPool) -> None:
    """Otherwise a rank that rebuilds a plan would wait for others that still have theirs."""
    assert workers.run(forgetting) == [[1, 1, 1, 1, 1]] * 4


def of_any_rows() -> Any:
    """Return losses and outputs of uneven rows; then the error for data parallel ranks with different numbers."""
    mesh = mesh_of(pp=2, dp_shard=2)
    place = mesh.get_local_rank("dp_shard")
    _, stages, loss, batch = make_case("mlp", 2, 14)
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=4), loss=loss, mesh=mesh)
    params, found, said = pipe.init(seed=3), [], ""
    for rows in (1, 5, 7):
        mine = {name: leaf[place * rows : (place + 1) * rows] for name, leaf in batch.items()}
        found.append((pipe(params, mine), pipe.forward(params, mine, gather="all")))
    try:
        pipe(params, {name: leaf[: 5 + place] for name, leaf in batch.items()})
    except AutofuncError as error:
        said = str(error)
    return place, found, said, pipe(params, {name: leaf[:5] for name, leaf in batch.items()})


def test_data_parallel_ranks_with_any_number_of_rows(workers: WorkerPool) -> None:
    model, _, loss, batch = make_case("mlp", 2, 14)
    params = model.init(seed=3)

    def expected(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        of_all = {name: leaf[:rows] for name, leaf in batch.items()}
        outputs = model(params, of_all)
        return loss(outputs, of_all).detach(), outputs

    for place, found, said, again in workers.run(of_any_rows):
        for rows, (value, outputs) in zip((1, 5, 7), found, strict=True):
            mean, of_both = expected(2 * rows)
            torch.testing.assert_close(value, mean)
            torch.testing.assert_close(outputs, of_both[place * rows : (place + 1) * rows])
        made = "make 2 of equal size and one of the rest" if place == 0 else "make 3 of equal size"
        assert f"the {5 + place} rows here {made}" in said
        torch.testing.assert_close(again, expected(5)[0])
