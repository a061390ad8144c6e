"""Arithmetic on trees: gradients of several calls, and averages of parameters, plain and sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.errors import ModelError
from autofunc.mesh import data_coordinate
from autofunc.shard.dtensors import local
from autofunc.tree import flatten, to_tensordict
from stages.gpt2 import build_gpt2_model
from tests.cases import cut_evenly, mesh_of
from tests.pool import WorkerPool


def batch_of(rows: slice) -> dict[str, Tensor]:
    """Rows with labels that do not count, of which batches have unequal numbers."""
    ids = torch.randint(0, 18, (12, 7), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    for row in range(12):
        labels[row, : row % 6] = -100
    return {"input_ids": ids[rows, :-1], "labels": labels[rows]}


def sums_and_averages(axes: dict[str, int]) -> None:
    model = build_gpt2_model(vocab_size=18, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    mesh = mesh_of(**axes) if axes else None
    place, places = data_coordinate(mesh)

    def gradients(params: Any, rows: slice) -> tuple[Tensor, Any, float]:
        batch = batch_of(rows)
        mine = {name: leaf.chunk(places)[place] for name, leaf in batch.items()}
        return *step(params, mine), float((batch["labels"] != -100).sum())

    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(cut_evenly(model, 2), s, loss=af.losses.causal_lm, mesh=mesh, engine="eager")
    step = af.value_and_grad(pipe)
    params = pipe.init(seed=1)
    whole_loss, whole, _ = gradients(params, slice(0, 12))
    loss_a, grads_a, weight_a = gradients(params, slice(0, 8))
    loss_b, grads_b, weight_b = gradients(params, slice(8, 12))
    assert weight_a != weight_b
    torch.testing.assert_close((loss_a * weight_a + loss_b * weight_b) / (weight_a + weight_b), whole_loss)
    summed = (grads_a * weight_a + grads_b * weight_b) / (weight_a + weight_b)
    for (path, leaf), found in zip(flatten(whole).items(), flatten(summed).values(), strict=True):
        assert type(found) is type(leaf)
        torch.testing.assert_close(local(found), local(leaf), rtol=1e-4, atol=1e-6, msg=path)
    optimizer = af.optimizer(torch.optim.AdamW, lr=0.1)
    average, before = params.clone(), {path: local(leaf).clone() for path, leaf in flatten(params).items()}
    params, _ = optimizer.update(grads_a + grads_b, optimizer.init(params), params)
    average = af.ema(average, params, decay=0.9)
    for path, leaf in flatten(average).items():
        assert type(leaf) is type(flatten(params)[path])
        torch.testing.assert_close(local(leaf), 0.9 * before[path] + 0.1 * local(flatten(params)[path]), msg=path)
    assert pipe(average, {name: leaf.chunk(places)[place] for name, leaf in batch_of(slice(0, 4)).items()}).isfinite()


def test_on_one_process() -> None:
    sums_and_averages({})


def test_on_shards(workers: WorkerPool) -> None:
    workers.run(sums_and_averages, {"pp": 2, "dp_shard": 2})


def test_what_an_average_is_of() -> None:
    params = to_tensordict({"a.w": torch.full((2,), 3.0, dtype=torch.bfloat16), "a.n": torch.tensor([4])})
    average = to_tensordict({"a.w": torch.ones(2), "a.n": torch.tensor([1])})
    made = af.ema(average, params, decay=0.5)
    assert made["a", "w"].tolist() == [2.0, 2.0] and made["a", "w"].dtype == torch.float32 and made["a", "n"].item() == 4
    assert average["a", "w"].tolist() == [1.0, 1.0] and params["a", "w"].tolist() == [3.0, 3.0], "both stay as they are"
    assert af.ema(average, params, decay=1.0)["a", "w"].tolist() == [1.0, 1.0]
    with pytest.raises(ModelError, match=r"decay=1.5; expected a number from 0 to 1"):
        af.ema(average, params, decay=1.5)
    with pytest.raises(ModelError, match=r"only one of the average and the parameters has 'a.n'; did you mean a.w"):
        af.ema(to_tensordict({"a.w": torch.ones(2)}), params, decay=0.5)
