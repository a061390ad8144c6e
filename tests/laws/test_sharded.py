"""The law of meshes: training over pp, dp and tp ranks follows the same training on one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import autofunc as af
from autofunc.mesh import AXES, data_coordinate
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from stages.llama import build_llama_model
from tests.cases import cut_evenly, mesh_of
from tests.pool import WorkerPool

SCHEDULES = ["1f1b", "interleaved_1f1b", "zb_h1", "zbv"]
STEPS, MANY_STEPS = 4, 20
MAX_NORM, LR = 0.5, 1e-3
MICROBATCHES = 4  # of all data parallel ranks together
ROWS = 2 * MICROBATCHES


def build(name: str) -> af.Model:
    if name.startswith("gpt2"):
        return build_gpt2_model(
            vocab_size=18,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.1 if name == "gpt2 with dropout" else 0.0,
        )
    if name == "llama with adapters":
        return af.lora(build("llama"), ["*_proj"], rank=2, alpha=4, dropout=0.1, modules_to_save=["norm"])
    return build_llama_model(
        vocab_size=18,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def batch_of(step: int) -> dict[str, Tensor]:
    """Return rows with different numbers of labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 18, (ROWS, 7), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(ROWS):
        labels[row, : row % 5] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


@cache
def on_one_process(name: str, steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Return losses, norms and the last parameters."""
    model = build(name)
    params = model.init(seed=3)
    optimizer = af.optimizer(torch.optim.AdamW, lr=LR)
    state = optimizer.init(params)
    step_function = af.reference_value_and_grad(model, af.losses.causal_lm, MICROBATCHES)
    losses, norms = [], []
    for step in range(steps):
        loss, grads = step_function(params, batch_of(step), (0, step))
        flat = flatten(grads)
        leaves = [torch.nn.Parameter(torch.empty(0)) for _ in flat]
        for leaf, grad in zip(leaves, flat.values(), strict=True):
            leaf.data, leaf.grad = torch.empty_like(grad), grad
        norms.append(torch.nn.utils.clip_grad_norm_(leaves, MAX_NORM).item())
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
    return losses, norms, flatten(params)


def train_on_mesh(
    name: str, schedule: str, sizes: tuple[int, int, int, int], steps: int, how: dict[str, Any], options: dict[str, Any]
) -> tuple[list[float], list[float], dict[str, Tensor] | None]:
    pp, dp_replicate, dp_shard, tp = sizes
    mesh = mesh_of(pp, dp_replicate, dp_shard, tp=tp)
    place, dp = data_coordinate(mesh)
    s = af.schedule.build(schedule, num_ranks=sizes[0], num_microbatches=MICROBATCHES // dp)
    pipe = af.pipeline(
        cut_evenly(build(name), s.num_stages),
        s,
        loss=af.losses.causal_lm,
        mesh=mesh,
        **how,
        sharding=af.Sharding(**options),
    )
    params = pipe.init(seed=3)
    optimizer = af.optimizer(torch.optim.AdamW, lr=LR)
    state = optimizer.init(params)
    losses, norms = [], []
    for step in range(steps):
        rows = {key: leaf.chunk(dp)[place] for key, leaf in batch_of(step).items()}
        loss, grads = af.value_and_grad(pipe)(params, rows, (0, step))
        grads, norm = pipe.clip(grads, MAX_NORM)
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
        norms.append(norm.item())
    full = flatten(pipe.gather(params))
    return losses, norms, full if dist.get_rank() == 0 else None


def check(
    pool: WorkerPool, name: str, schedule: str, sizes: tuple[int, ...], how: dict[str, Any] | None = None,
    steps: int = STEPS, **options: Any,
) -> None:  # fmt: skip
    """`how`: options of `af.pipeline`; `options`: of `af.Sharding`."""
    found = pool.run(train_on_mesh, name, schedule, sizes, steps, how or {}, options)
    losses, norms, params = on_one_process(name, steps)
    for each in found:
        assert each[0] == found[0][0] and each[1] == found[0][1], "the same on every rank"
    torch.testing.assert_close(found[0][0], losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], norms, rtol=1e-4, atol=1e-5)
    full = found[0][2]
    assert full.keys() == params.keys()
    for path, leaf in params.items():
        torch.testing.assert_close(full[path], leaf, rtol=1e-5, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


def places_on(sizes: dict[str, int]) -> tuple[tuple[str, ...], list[int]]:
    """Names of the axes, and this process's place on each."""
    mesh = mesh_of(**sizes)
    return tuple(mesh.mesh_dim_names or ()), list(mesh.get_coordinate() or ())


def test_axes_are_in_the_order_of_the_mesh(workers: WorkerPool) -> None:
    """tp ranks are next to each other, pp ranks farthest apart."""
    for rank, (names, place) in enumerate(workers.run(places_on, {"pp": 2, "tp": 2})):
        assert names == tuple(axis for axis in AXES if axis != "cp") and place == [rank // 2, 0, 0, rank % 2]
    for rank, (names, place) in enumerate(workers.run(places_on, {"cp": 2, "tp": 2})):
        assert names == AXES and place == [0, 0, 0, rank // 2, rank % 2]
    for rank, (_, place) in enumerate(workers.run(places_on, {"dp_replicate": 2, "dp_shard": 2})):
        assert place == [0, rank // 2, rank % 2, 0]


MESHES = {"pp dp": (2, 1, 2, 1), "pp tp": (2, 1, 1, 2), "dp tp": (1, 1, 2, 2)}


@pytest.mark.parametrize(
    ("mesh", "name", "schedule"),
    [("pp dp", "gpt2", "zb_h1"), ("pp tp", "llama", "zbv"), ("dp tp", "gpt2", "1f1b")],
)
def test_many_steps_on_each_pair_of_axes(workers: WorkerPool, mesh: str, name: str, schedule: str) -> None:
    check(workers, name, schedule, MESHES[mesh], steps=MANY_STEPS)


def combinations() -> list[Any]:
    """Each schedule on each mesh in both engines, the models in turn; three are run by default."""
    default = {("pp dp", "1f1b", "eager"), ("pp tp", "interleaved_1f1b", "eager"), ("dp tp", "zb_h1", "eager")}
    found = []
    for row, mesh in enumerate(MESHES):
        for column, schedule in enumerate(SCHEDULES):
            for turn, engine in enumerate(("graph", "eager")):
                name = ("gpt2", "llama")[(row + column + turn) % 2]
                marks = [] if (mesh, schedule, engine) in default else [pytest.mark.full]
                found.append(pytest.param(mesh, name, schedule, engine, marks=marks))
    return found


@pytest.mark.parametrize(("mesh", "name", "schedule", "engine"), combinations())
def test_each_pair_of_axes(workers: WorkerPool, mesh: str, name: str, schedule: str, engine: str) -> None:
    check(workers, name, schedule, MESHES[mesh], {"engine": engine})


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "schedule", "engine"),
    [
        ("gpt2", "1f1b", "eager"),
        ("llama", "interleaved_1f1b", "graph"),
        ("gpt2", "zb_h1", "graph"),
        ("llama", "zbv", "eager"),
    ],
)
def test_pp_dp_tp_on_eight_processes(eight_workers: WorkerPool, name: str, schedule: str, engine: str) -> None:
    check(eight_workers, name, schedule, (2, 1, 2, 2), {"engine": engine})


WAYS: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any], dict[str, Any], str]] = {
    # model, schedule, mesh, options of the pipeline and of sharding, engine that is tried by default
    "sequence": ("gpt2 with dropout", "zb_h1", (2, 1, 1, 2), {}, {"sequence_parallel": True}, "graph"),
    "each use": ("llama", "zbv", (2, 1, 2, 1), {}, {"reshard_after_forward": True}, "eager"),
    "each use, ahead": (
        "gpt2", "interleaved_1f1b", (2, 1, 2, 1), {}, {"reshard_after_forward": True, "prefetch": 3}, "graph",
    ),
    "hsdp": ("gpt2 with dropout", "1f1b", (1, 2, 2, 1), {}, {"prefetch": 0}, "eager"),
    "ddp": ("gpt2", "zb_h1", (2, 2, 1, 1), {}, {}, "graph"),
    "remat": ("llama", "1f1b", (1, 1, 2, 2), {"remat": "stage"}, {"sequence_parallel": True}, "eager"),
    "offload without dp": (
        "gpt2", "1f1b", (2, 1, 1, 2), {}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, "graph",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("way", "engine"),
    [
        pytest.param(way, engine, marks=[] if engine == WAYS[way][-1] else [pytest.mark.full])
        for way in WAYS
        for engine in ("graph", "eager")
    ],
)
def test_other_policies(workers: WorkerPool, way: str, engine: str) -> None:
    name, schedule, sizes, how, options, _ = WAYS[way]
    check(workers, name, schedule, sizes, {"engine": engine, **how}, **options)


@pytest.mark.parametrize("engine", ["eager", pytest.param("graph", marks=pytest.mark.full)])
def test_everything_on_eight_processes(eight_workers: WorkerPool, engine: str) -> None:
    options = {"sequence_parallel": True, "reshard_after_forward": True}
    check(eight_workers, "gpt2 with dropout", "zbv", (2, 1, 2, 2), {"engine": engine}, **options)


@pytest.mark.full
def test_compiled(workers: WorkerPool) -> None:
    workers.seconds_for_one_call = 600.0  # four processes compile, on as few as two cores
    check(workers, "llama", "1f1b", (1, 1, 2, 2), {"compile": True})


# --- precision ----------------------------------------------------------------------------------------------------

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@cache
def on_one_process_in_bf16(name: str) -> tuple[list[float], dict[str, Tensor]]:
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=MICROBATCHES)
    sharding = af.Sharding(mp_policy=BF16)
    pipe = af.pipeline(af.split(build(name)), s, loss=af.losses.causal_lm, sharding=sharding)
    params, optimizer = pipe.init(seed=3), af.optimizer(torch.optim.AdamW, lr=LR)
    state, losses = optimizer.init(params), []
    for step in range(STEPS):
        loss, grads = af.value_and_grad(pipe)(params, batch_of(step), (0, step))
        grads, _ = pipe.clip(grads, MAX_NORM)
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
    return losses, flatten(params)


@pytest.mark.parametrize(
    ("name", "sizes", "tolerance"),
    [
        pytest.param("gpt2", (2, 1, 2, 1), 1e-5, id="gpt2, pp dp: the same products"),
        pytest.param("llama", (1, 1, 2, 2), 1e-2, id="llama, tp: other products in bf16"),
        pytest.param("llama", (2, 1, 2, 1), 1e-5, id="llama, pp dp", marks=pytest.mark.full),
        pytest.param("gpt2", (1, 1, 2, 2), 1e-2, id="gpt2, tp", marks=pytest.mark.full),
    ],
)
def test_bf16_follows_one_process_in_bf16(workers: WorkerPool, name: str, sizes: tuple[int, ...], tolerance: float) -> None:
    found = workers.run(train_on_mesh, name, "1f1b", sizes, STEPS, {}, {"mp_policy": BF16})[0]
    losses, params = on_one_process_in_bf16(name)
    torch.testing.assert_close(found[0], losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(losses, on_one_process(name, STEPS)[0], rtol=1e-2, atol=1e-2)
    for path, leaf in params.items():
        torch.testing.assert_close(found[2][path], leaf, rtol=tolerance, atol=tolerance)
        assert leaf.dtype == torch.float32


@pytest.mark.parametrize("mesh", ["pp dp", *(pytest.param(mesh, marks=pytest.mark.full) for mesh in ("pp tp", "dp tp"))])
def test_adapters(workers: WorkerPool, mesh: str) -> None:
    """Factors are cut as their weights are, and dropout draws the same."""
    check(workers, "llama with adapters", "zb_h1", MESHES[mesh], sequence_parallel=mesh == "dp tp")
