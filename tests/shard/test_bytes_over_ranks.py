"""A tp rank's bytes of a captured model's parameters: its part of those the table cuts, all of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.shard.dtensors import local
from autofunc.tree import flatten
from tests.cases import mesh_of
from tests.pool import WorkerPool
from tests.shard.spread_models import batch_of, model_of

Held = dict[str, int]


def held(name: str, axes: dict[str, int]) -> tuple[Held, int, Held]:
    """Bytes in memory of this process's parameters, of all its gradients, and of AdamW's first slots; by path."""
    batch = batch_of(name)
    pp = axes.get("pp", 1)
    s = af.schedule.build("1f1b", num_ranks=pp, num_microbatches=2)
    pipe = af.pipeline(af.split(af.from_module(model_of(name), batch), pp), s, mesh=mesh_of(**axes))
    params = pipe.init()
    _, grads = af.value_and_grad(pipe)(params, batch)
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-3)
    params, state = optimizer.update(grads, optimizer.init(params), params)
    # gradients that were summed over ranks in one go are parts of the same memory
    of_grads = {storage.data_ptr(): storage.nbytes() for storage in map(storage_of, flatten(grads).values())}
    return bytes_of(params), sum(of_grads.values()), bytes_of(state["exp_avg"])


def storage_of(leaf: torch.Tensor) -> torch.UntypedStorage:
    return local(leaf).untyped_storage()


def bytes_of(tree: Any) -> Held:
    return {path: storage_of(leaf).nbytes() for path, leaf in flatten(tree).items()}


def by_arithmetic(name: str, tp: int) -> Held:
    """All elements of a parameter, 4 bytes each; a `tp`-th of those that the table names."""
    model = af.from_module(model_of(name), batch_of(name))
    cuts = model.over_ranks("tp", tp, None, sequence=False).cuts
    assert cuts
    own = {path: leaf for path, leaf in model.spec.items() if model.canonical(path) == path}  # a tied one is held once
    return {path: 4 * leaf.numel() // (tp if path in cuts else 1) for path, leaf in own.items()}


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("llama", {"pp": 2, "tp": 2}),
        *(pytest.param(name, {"pp": 2, "tp": 2}, marks=pytest.mark.full) for name in ("phi3", "gpt2", "mixtral")),
        pytest.param("llama", {"tp": 4}, marks=pytest.mark.full),  # more ranks than heads of keys, which are whole
    ],
)
def test_bytes_of_parameters(workers: WorkerPool, name: str, axes: dict[str, int]) -> None:
    expected = by_arithmetic(name, axes["tp"])
    for params, grads, slots in (ranks := workers.run(held, name, axes)):
        assert params == {path: expected[path] for path in params}
        assert slots == params
        assert grads == sum(params.values())
    assert {path for params, _, _ in ranks for path in params} == expected.keys()
    if axes.get("pp", 1) == 1:
        largest = max(sum(params.values()) for params, _, _ in ranks)
        assert largest == sum(expected.values()) < sum(by_arithmetic(name, 1).values())
