"""Captured modules over tp ranks follow one process."""

from __future__ import annotations

from typing import Any

import torch

import autofunc as af
from autofunc.tree import flatten
from tests.cases import mesh_of
from tests.pool import WorkerPool
from tests.shard.spread_models import batch_of, model_of

Losses = list[float]


def steps_of(
    name: str, axes: dict[str, int] | None, engine: str, num: int, sharding: dict[str, Any]
) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Losses of some steps of AdamW, and all parameters after them."""
    batch = batch_of(name)
    model = af.from_module(model_of(name), batch)
    pp = (axes or {}).get("pp", 1)
    stages = af.split(model, "auto" if pp > 1 else (), num_stages=pp) if pp > 1 else af.split(model, 1)
    s = af.schedule.build("1f1b", num_ranks=pp, num_microbatches=2)
    mesh = None if axes is None else mesh_of(**axes)
    options = {} if axes is None else sharding
    pipe = af.pipeline(stages, s, loss=None, mesh=mesh, engine=engine, sharding=af.Sharding(**options))
    params = pipe.init()
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-3)
    state, losses = optimizer.init(params), []
    for step in range(num):
        loss, grads = af.value_and_grad(pipe)(params, batch, key=(0, step))
        grads, _ = pipe.clip(grads, 1.0)
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
    return losses, {path: leaf.detach().clone() for path, leaf in flatten(pipe.gather(params)).items()}


def check(workers: WorkerPool, name: str, axes: dict[str, int], engine: str = "graph", **sharding: Any) -> None:
    """Five steps on processes are those of one."""
    losses, params = steps_of(name, None, "graph", 5, {})
    for found, others in workers.run(steps_of, name, axes, engine, 5, sharding):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        assert others.keys() == params.keys()
        for path, leaf in params.items():
            torch.testing.assert_close(
                others[path], leaf, rtol=1e-5, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}"
            )


def test_llama(workers: WorkerPool) -> None:
    check(workers, "llama", {"pp": 2, "tp": 2})
