"""Overlapped pairs run side by side where ranks exchange values: the bits are those of one after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.mesh import data_coordinate
from stages.moe import build_moe_model, moe_causal_lm
from tests.cases import assert_same_tree, cut_evenly, mesh_of, plan_of
from tests.pool import WorkerPool


def moe_pipe(overlap: bool, **options: Any) -> tuple[af.Pipeline, Any]:
    model = build_moe_model(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    mesh, s = mesh_of(pp=2, dp_shard=2), af.schedule.build("dualpipe_v", num_ranks=2, num_microbatches=6)
    loss, sharding = partial(moe_causal_lm, router_aux_loss_coef=0.1), af.Sharding(expert_parallel=2)
    pipe = af.pipeline(cut_evenly(model, 4), s, loss=loss, mesh=mesh, sharding=sharding, overlap_f_b=overlap, **options)
    ids = torch.randint(0, 17, (24, 7), generator=torch.Generator().manual_seed(0))
    ids = ids.chunk(2)[data_coordinate(mesh)[0]]
    return pipe, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def both_ways(remat: str | None) -> None:
    found = []
    for overlap in (False, True):
        pipe, batch = moe_pipe(overlap, remat=remat)
        params = pipe.init(seed=1)
        for _ in range(2):
            loss, grads = af.value_and_grad(pipe)(params, batch)
            found.append((loss, pipe.gather(grads)))
        pairs = plan_of(pipe, params, batch).pairs
        assert len(pairs) == (2 if overlap else 0)
    loss, grads = found[0]
    for other_loss, other_grads in found[1:]:
        assert torch.equal(loss, other_loss)
        assert_same_tree(grads, other_grads)


@pytest.mark.parametrize("remat", [None, "stage"])
def test_experts(workers: WorkerPool, remat: str | None) -> None:
    workers.run(both_ways, remat)
