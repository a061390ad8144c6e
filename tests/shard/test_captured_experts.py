"""Experts of captured modules spread over ranks, beside tp and cp: numbers are those of one process with all their rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.mesh import data_coordinate
from autofunc.tree import flatten
from tests.cases import assert_same_tree, mesh_of
from tests.pool import WorkerPool

Sizes = dict[str, int]

MICROBATCHES, ROWS, TOKENS, STEPS = 2, 2, 8, 3  # of each rank


def captured(name: str) -> tuple[af.Model, Any]:
    from tests.captured.test_routed_experts import built, text

    model = af.from_module(built(name), masked(name, text(ROWS)["input_ids"]))
    names = list(model.layers)
    return model, lambda number: af.split(model, [name for name in names if name.endswith("layers.1")][: number - 1])


def masked(name: str, ids: Tensor) -> dict[str, Tensor]:
    """A batch; of the module that has a balance loss with padding, which that leaves out: rows count differently."""
    batch = {"input_ids": ids, "labels": ids}
    return {**batch, "attention_mask": (ids.cumsum(-1) < 60).long()} if name == "Mixtral" else batch


def pipe_on(sizes: Sizes, size: int, name: str, engine: str = "graph", **options: Any) -> af.Pipeline:
    _, split = captured(name)
    s = af.schedule.build("1f1b", num_ranks=sizes.get("pp", 1), num_microbatches=MICROBATCHES)
    sharding = af.Sharding(expert_parallel=size, **options)
    return af.pipeline(split(s.num_stages), s, mesh=mesh_of(**sizes), engine=engine, sharding=sharding)


def batches(places: int) -> Tensor:
    """Tokens of all data parallel ranks, a step each."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 23, (STEPS, places * MICROBATCHES * ROWS, TOKENS), generator=generator)


def steps(value_and_grad: Any, params: Any, name: str, ids: Tensor, clip: Any) -> Any:
    """Losses of some steps of AdamW, and the weights afterwards."""
    opt = af.optimizer(torch.optim.AdamW, lr=0.01, eps=1e-6)
    state, losses = opt.init(params), []
    for rows in ids:
        loss, grads = value_and_grad(params, masked(name, rows))
        losses.append(loss)
        params, state = opt.update(clip(grads), state, params)
    return losses, params


def clipped(grads: Any) -> Any:
    norm = torch.stack([leaf.double().square().sum() for leaf in flatten(grads).values()]).sum().sqrt()
    return grads * min(1.0, (1.0 / (norm + 1e-6)).item())


def alone(name: str, places: int, together: int) -> Any:
    """One process, whose microbatches have the rows of so many data parallel ranks."""
    ids = batches(places).view(STEPS, places // together, together, MICROBATCHES, ROWS, TOKENS).transpose(2, 3)
    model = captured(name)[0]
    value_and_grad = af.reference_value_and_grad(model, None, MICROBATCHES * places // together)
    return steps(value_and_grad, model.init(), name, ids.reshape(STEPS, -1, TOKENS), clipped)


def over(sizes: Sizes, size: int, name: str, engine: str, options: dict[str, Any]) -> Any:
    pipe = pipe_on(sizes, size, name, engine, **options)
    place, places = data_coordinate(pipe.mesh)
    ids = batches(places).chunk(places, 1)[place]
    losses, params = steps(af.value_and_grad(pipe), pipe.init(), name, ids, lambda grads: pipe.clip(grads, 1.0)[0])
    return losses, pipe.gather(params)


def follows_one_process(
    workers: WorkerPool, sizes: Sizes, size: int, name: str, engine: str = "graph", **options: Any
) -> None:  # fmt: skip
    places = sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1)
    losses, params = alone(name, places, max(size // sizes.get("cp", 1), 1))
    for found_losses, found in workers.run(over, sizes, size, name, engine, options):
        torch.testing.assert_close(torch.stack(found_losses), torch.stack(losses), rtol=1e-5, atol=1e-6)
        for path, leaf in flatten(params).items():
            torch.testing.assert_close(flatten(found)[path], leaf, rtol=1e-5, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")


_BESIDE_PP, _BESIDE_TP = {"pp": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}


def full(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("sizes", "name", "engine"),
    [
        (_BESIDE_PP, "DeepseekV3", "graph"),
        (_BESIDE_TP, "Mixtral", "graph"),
        *(full(_BESIDE_PP, name, "graph") for name in ("Mixtral", "Qwen3Moe", "Olmoe", "GptOss")),
        *(full(_BESIDE_PP, name, "eager") for name in ("Mixtral", "Qwen3Moe", "GptOss")),
        *(full(_BESIDE_TP, name, "graph") for name in ("Qwen3Moe", "DeepseekV3")),
        full(_BESIDE_TP, "Mixtral", "eager"),
        full({"pp": 2, "cp": 2}, "Mixtral", "graph"),
        full({"cp": 2, "tp": 2}, "Olmoe", "graph"),
    ],
    ids=str,
)  # fmt: skip
def test_they_follow_one_process(workers: WorkerPool, sizes: Sizes, name: str, engine: str) -> None:
    follows_one_process(workers, sizes, 2, name, engine)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "options"), [("Mixtral", {"sequence_parallel": True}), ("GptOss", {"tensor_parallel": "derived"})], ids=str
)
def test_other_choices_of_tp(workers: WorkerPool, name: str, options: dict[str, Any]) -> None:
    follows_one_process(workers, _BESIDE_TP, 2, name, **options)


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "size", "engine"),
    [
        ({"pp": 2, "cp": 2, "tp": 2}, 2, "graph"),
        ({"pp": 2, "cp": 2, "tp": 2}, 2, "eager"),
        ({"dp_replicate": 2, "cp": 2, "tp": 2}, 2, "graph"),
        ({"pp": 2, "dp_replicate": 2, "cp": 2}, 2, "graph"),
        ({"dp_shard": 2, "cp": 2, "tp": 2}, 2, "graph"),
        ({"dp_shard": 2, "cp": 2, "tp": 2}, 4, "graph"),
    ],
    ids=str,
)
def test_all_axes_together(eight_workers: WorkerPool, sizes: Sizes, size: int, engine: str) -> None:
    assert math.prod(sizes.values()) == eight_workers.size
    follows_one_process(eight_workers, sizes, size, "Mixtral", engine)


def stored(folder: str) -> tuple[Any, Any]:
    """Trained by ranks that cut experts over tp too, and what others read of it: with cp instead, and with other values."""
    pipe = pipe_on(_BESIDE_TP, 2, "Mixtral")
    params, opt = pipe.init(), af.optimizer(torch.optim.AdamW, lr=0.01)
    state = opt.init(params)
    place, places = data_coordinate(pipe.mesh)
    _, grads = af.value_and_grad(pipe)(params, masked("Mixtral", batches(places)[0].chunk(places)[place]))
    params, state = opt.update(grads, state, params)
    gate_up = flatten(params)["model.layers.0.mlp.experts.gate_up_proj"]
    assert tuple(gate_up.shape) == (4, 48, 16) and tuple(gate_up.to_local().shape) == (2, 24, 16)
    af.save(f"{folder}/checkpoint", params=params, optimizer_state=state)
    whole = pipe.gather(params)
    for sizes, size in (({"pp": 2, "cp": 2}, 2), (_BESIDE_TP, 1), (_BESIDE_TP, 2)):
        others = pipe_on(sizes, size, "Mixtral")
        found = af.load(f"{folder}/checkpoint", others, optimizer=opt)
        assert_same_tree(whole, others.gather(found.params))
        assert_same_tree(whole, others.gather(others.place(whole)))
    return whole, pipe.gather(state["exp_avg"])


@pytest.mark.full
def test_checkpoints_know_no_layout(workers: WorkerPool, tmp_path: Path) -> None:
    params, moments = workers.run(stored, str(tmp_path))[0]
    _, split = captured("Mixtral")
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=MICROBATCHES)
    found = af.load(tmp_path / "checkpoint", af.pipeline(split(1), s), optimizer=af.optimizer(torch.optim.AdamW, lr=0.01))
    assert_same_tree(params, found.params)
    assert_same_tree(moments, found.optimizer_state["exp_avg"])
