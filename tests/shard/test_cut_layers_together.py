"""Captured modules over tp, cp and ep ranks, beside pp, with all else that a pipeline does.

Init, place, gather, clip, costs, memory, and checkpoints that another layout goes on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.tree import flatten
from tests.cases import mesh_of
from tests.pool import WorkerPool
from tests.shard.spread_models import batch_of, model_of

CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "tp": ("llama", {"pp": 2, "tp": 2}, {"sequence_parallel": True}),
    "cp": ("llama", {"pp": 2, "cp": 2}, {"context_parallel": "ring"}),
    "ep": ("mixtral", {"pp": 2, "dp_shard": 2}, {"expert_parallel": 2}),
}
Found = dict[str, Any]


def pipe_of(name: str, axes: dict[str, int] | None, sharding: dict[str, Any], num: int = 2) -> af.Pipeline:
    pp = (axes or {}).get("pp", 1)
    model = af.from_module(model_of(name), batch_of(name))
    s = af.schedule.build("1f1b", num_ranks=pp, num_microbatches=num)
    mesh = None if axes is None else mesh_of(**axes)
    return af.pipeline(af.split(model, pp), s, mesh=mesh, sharding=af.Sharding(**sharding))


def whole(pipe: af.Pipeline, params: Any) -> dict[str, torch.Tensor]:
    return {path: leaf.detach().clone() for path, leaf in flatten(pipe.gather(params)).items()}


def optimizer() -> af.Optimizer:
    return af.optimizer(torch.optim.AdamW, lr=1e-2)


def all_of_it(case: str | None, folder: Path, axes: dict[str, int] | None) -> Found:
    """What one process finds; without a case on a process of its own."""
    name, _, sharding = CASES[case] if axes is not None and case is not None else (str(case), None, {})
    batch = batch_of(name)
    if "dp_shard" in (axes or {}):  # this process's rows
        batch = {key: leaf.chunk(2)[mesh_of(**axes).get_local_rank("dp_shard")] for key, leaf in batch.items()}  # type: ignore[arg-type]
    pipe = pipe_of(name, axes, sharding, num=2 if axes is not None else 4 if name == "mixtral" else 2)
    params = pipe.init()
    found: Found = {"init": whole(pipe, params)}
    found["place"] = whole(pipe, pipe.place(found["init"]))
    loss, grads = af.value_and_grad(pipe)(params, batch, key=(0, 0))
    grads, norm = pipe.clip(grads, 0.5)
    found |= {"loss": loss.item(), "norm": float(norm), "grads": whole(pipe, grads)}
    if axes is not None:
        costs, kept = pipe.costs(params, batch), pipe.memory(params, batch)
        found["costs"] = [float(each) for each in costs.F]  # type: ignore[union-attr]
        found["kept"] = [sum(stage.outputs) for stage in kept]
        opt = optimizer()
        params, state = opt.update(grads, opt.init(params), params)
        af.save(folder, params=params, optimizer_state=state)
        found |= {"after": whole(pipe, params), "slots": whole(pipe, state["exp_avg"])}
    return found


def gone_on(name: str, axes: dict[str, int] | None, folder: Path) -> Found:
    """A checkpoint in another layout."""
    pipe = pipe_of(name, axes, {})
    found = af.load(folder, pipe, optimizer=optimizer())
    loss, _ = af.value_and_grad(pipe)(found.params, batch_of(name), key=(0, 1))
    return {
        "after": whole(pipe, found.params), "slots": whole(pipe, found.optimizer_state["exp_avg"]), "loss": loss.item(),
    }  # fmt: skip


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        torch.testing.assert_close(
            found[path], leaf, rtol=tolerance, atol=tolerance, msg=lambda text, path=path: path + text
        )


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_cut_layers_on_every_axis_together(workers: WorkerPool, case: str, tmp_path: Path) -> None:
    name, axes, _ = CASES[case]
    alone = all_of_it(name, tmp_path, None)
    ranks = workers.run(all_of_it, case, tmp_path / "written", axes)
    for found in ranks:
        same(found["init"], alone["init"], 0)
        same(found["place"], alone["init"], 0)
        same(found["grads"], alone["grads"], 1e-5)
        assert (found["loss"], found["norm"]) == pytest.approx((alone["loss"], alone["norm"]), rel=1e-5)
        assert len(found["costs"]) == 2 and min(found["costs"]) > 0
        assert found["kept"] == ranks[0]["kept"] and found["kept"][0] > 0
    others = [
        gone_on(name, None, tmp_path / "written"),
        *workers.run(gone_on, name, {"pp": 2, "dp_replicate": 2}, tmp_path / "written"),
    ]
    for found in others:
        same(found["after"], ranks[0]["after"], 0)
        same(found["slots"], ranks[0]["slots"], 0)
