"""Reported memory and time hold on an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from tests.gpu.test_laws import pipe_of
from tests.laws.test_memory import check_bytes

pytestmark = pytest.mark.gpu


def pipe_of_size(name: str, num_ranks: int = 4, num_microbatches: int = 8, **options: Any) -> tuple[Any, Any, Any]:
    """Large enough that activations, not launches, count."""
    model = build_gpt2_model(vocab_size=512, n_positions=256, n_embd=512, n_layer=8, n_head=8)
    s = af.schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    ids = torch.randint(0, 512, (8 * num_microbatches, 256), generator=torch.Generator().manual_seed(0)).cuda()
    pipe = af.pipeline(af.split(model, s.num_stages), s, loss=af.losses.causal_lm, **options)
    return pipe, model.init(seed=0, device="cuda"), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv", "gpipe"])
def test_measured_bytes_equal_the_simulators(name: str) -> None:
    pipe, full, batch, _ = pipe_of("gpt2", name)
    check_bytes(pipe, full, batch, (3, 5))


@pytest.mark.parametrize(("name", "remat"), [("1f1b", None), ("gpipe", None), ("gpipe", "layer")])
def test_the_allocators_peak(name: str, remat: str | None) -> None:
    """All ranks live on one device, so the sum of what they keep is at most what the allocator saw, and nearly it."""
    pipe, params, batch = pipe_of_size(name, remat=remat)
    step = af.value_and_grad(pipe)
    simulated = af.schedule.live_bytes(pipe.schedule, pipe.memory(params, batch))
    loss, grads = step(params, batch)
    del loss, grads
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(params, batch)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    known = max(row.max() for row in simulated)
    assert peak >= known
    assert peak <= 1.5 * sum(row.max() for row in simulated) + 2 * sum(leaf.nbytes for leaf in flatten(params).values())


def test_profile_and_costs() -> None:
    pipe, params, batch = pipe_of_size("zb_h1")
    timeline = pipe.profile(params, batch, steps=3)
    costs = pipe.costs(params, batch, steps=3)
    predicted = af.schedule.simulate(pipe.schedule, costs)
    assert 0 < predicted.makespan < timeline.makespan, "ranks of one process take turns"
    assert all(cost > 0 for cost in costs.F)
