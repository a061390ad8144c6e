"""`autofunc plan` counts the connections that a pipeline makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.batch import split_batch
from autofunc.splitting import infer_boundaries
from autofunc.train.connections import assumed, count_connections, most_bytes
from stages.gpt2 import build_gpt2_model
from tests.cases import cut_evenly, plan_of


@pytest.mark.parametrize(("schedule", "ranks"), [("1f1b", 4), ("interleaved_1f1b", 3), ("zbv", 2), ("gpipe", 1)])
def test_the_count_matches_the_pipeline(schedule: str, ranks: int) -> None:
    model: Any = build_gpt2_model(vocab_size=18, n_positions=8, n_embd=8, n_layer=6, n_head=2)  # ties the ends
    made = af.schedule.build(schedule, num_ranks=ranks, num_microbatches=6)
    stages, loss = cut_evenly(model, made.num_stages), af.losses.causal_lm
    ids = torch.zeros((6, 7), dtype=torch.int64)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    recipe: Any = SimpleNamespace(schedule=made, model=model, stages=stages)
    found = count_connections(recipe, infer_boundaries(stages, {}, split_batch(batch, 6)[0], loss))
    pipe = af.pipeline(stages, made, loss=loss)
    channels = plan_of(pipe, pipe.init(), batch).channels
    assert found == tuple(sum(rank in channel for channel in channels) for rank in range(ranks))
    assert sum(found) == 2 * len(channels) and (ranks == 1) == (not channels)


def test_their_memory() -> None:
    few = af.Transfers(max_ctas=4)
    assert most_bytes(3, af.Transfers()) == 3 * 32 * 4 * 2**20 and most_bytes(3, few) == 3 * 4 * 4 * 2**20
    assert "32 channels (NCCL's limit" in assumed(af.Transfers()) and "4 channels (transfers.max_ctas)" in assumed(few)
