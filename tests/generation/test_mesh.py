"""Several processes: each rank has some rows of every step, and all get all tokens."""

from __future__ import annotations

from typing import Any

import autofunc as af
from autofunc.errors import MeshError
from stages.gpt2 import build_gpt2_model
from tests.cases import mesh_of, pp_mesh
from tests.pool import WorkerPool

ROWS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
HOW: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.9, "seed": 2}


def pipe_over(mesh: Any) -> af.Pipeline:
    model = build_gpt2_model(vocab_size=30, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6)
    schedule = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    return af.pipeline(af.split(model, ["h.1"]), schedule, loss=af.losses.causal_lm, mesh=mesh)


def generated() -> list[list[int]]:
    """By two processes; three rows make two caches of two."""
    pipe = pipe_over(pp_mesh(2))
    return af.generate(pipe, pipe.init(seed=1), ROWS, **HOW)


def refused() -> str:
    pipe = pipe_over(mesh_of(pp=2, dp_shard=2))
    try:
        af.generate(pipe, pipe.init(seed=1), ROWS, **HOW)
    except MeshError as error:
        return str(error)
    return "nothing"


def test_every_process_gets_the_tokens_of_one(workers: WorkerPool) -> None:
    alone = pipe_over(None)
    expected = af.generate(alone, alone.init(seed=1), ROWS, **HOW)
    assert len({*map(tuple, expected)}) == 3
    assert workers.run(generated) == [expected] * workers.size


def test_parameters_that_are_cut(workers: WorkerPool) -> None:
    assert all("dp_shard=2, which shards parameters" in said for said in workers.run(refused))
