"""Captured modules over tp ranks follow one process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.engine.partition import in_order
from autofunc.tree import flatten
from tests.cases import mesh_of, plan_of
from tests.pool import WorkerPool
from tests.shard.spread_models import batch_of, model_of
from tests.shard.test_collectives import Counting, kind_of, more

Losses = list[float]


def steps_of(
    name: str,
    axes: dict[str, int] | None,
    engine: str,
    num: int,
    sharding: dict[str, Any],
    places: int = 1,
    schedule: str = "1f1b",
    options: dict[str, Any] | None = None,
) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Losses of some steps of AdamW, and all parameters after them."""
    batch = batch_of(name)
    dp = {axis: size for axis, size in (axes or {}).items() if axis.startswith("dp")}
    mesh = None if axes is None else mesh_of(**axes)
    if dp and mesh is not None:  # this process's rows
        ((axis, size),) = dp.items()
        batch = {key: leaf.chunk(size)[mesh.get_local_rank(axis)] for key, leaf in batch.items()}
    model = af.from_module(model_of(name), batch)
    pp = (axes or {}).get("pp", 1)
    stages = af.split(model, pp)
    s = af.schedule.build(schedule if pp > 1 else "1f1b", num_ranks=pp, num_microbatches=2 * places)
    chosen = af.Sharding(**({} if axes is None else sharding))
    pipe = af.pipeline(stages, s, loss=None, mesh=mesh, engine=engine, sharding=chosen, **(options or {}))
    params = pipe.init()
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-3, eps=1e-6)  # biases of keys have gradients of rounding errors alone
    state, losses = optimizer.init(params), []
    for step in range(num):
        loss, grads = af.value_and_grad(pipe)(params, batch, key=(0, step))
        grads, _ = pipe.clip(grads, 1.0)
        params, state = optimizer.update(grads, state, params)
        losses.append(loss.item())
    return losses, {path: leaf.detach().clone() for path, leaf in flatten(pipe.gather(params)).items()}


def check(workers: WorkerPool, name: str, axes: dict[str, int], engine: str = "graph", **sharding: Any) -> None:
    """Five steps on processes are those of one."""
    rows = 2 if "dp_shard" in axes or "dp_replicate" in axes else 1
    losses, params = steps_of(name, None, "graph", 5, {}, rows)
    for found, others in workers.run(steps_of, name, axes, engine, 5, sharding):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        assert others.keys() == params.keys()
        for path, leaf in params.items():
            torch.testing.assert_close(
                others[path], leaf, rtol=1e-5, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}"
            )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pipeline_over_tp_ranks(workers: WorkerPool, name: str) -> None:
    """GPT-2 has fused weights, a tied head and dropout."""
    check(workers, name, {"pp": 2, "tp": 2})


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "graph") for name in ("qwen3", "gemma3", "phi3", "bert", "t5", "mixtral", "qwen3_moe", "olmoe", "torch")),
        *((name, "eager") for name in ("llama", "gpt2", "t5", "mixtral")),
    ],
)
def test_models_over_tp_ranks(workers: WorkerPool, name: str, engine: str) -> None:
    check(workers, name, {"pp": 2, "tp": 2}, engine)


@pytest.mark.full
@pytest.mark.parametrize("options", [{"remat": "layer"}, {"remat": "stage"}, {"compile": True}])
def test_schedules_and_engines_do_not_depend_on_it(workers: WorkerPool, options: dict[str, Any]) -> None:
    """Backwards in two halves, what is computed again, compiled pieces."""
    losses, params = steps_of("llama", None, "graph", 5, {})
    for found, others in workers.run(steps_of, "llama", {"pp": 2, "tp": 2}, "graph", 5, {}, 1, "zb_h1", options):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=1e-5)
        for path, leaf in params.items():
            torch.testing.assert_close(others[path], leaf, rtol=1e-4, atol=2e-5, msg=path)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral"])
def test_with_other_axes(workers: WorkerPool, name: str) -> None:
    check(workers, name, {"dp_shard": 2, "tp": 2})
    check(workers, name, {"dp_replicate": 2, "tp": 2}, sequence_parallel=True)


@pytest.mark.full
@pytest.mark.parametrize("name", ["torch", "olmoe"])
def test_derived_tables(workers: WorkerPool, name: str) -> None:
    """Attention of torch's own layers, and of OLMoE, whose norms of queries and keys are over all heads."""
    check(workers, name, {"pp": 2, "tp": 2}, tensor_parallel="derived")
    check(workers, name, {"tp": 4}, "eager", tensor_parallel="derived", sequence_parallel=True)


@pytest.mark.full
def test_more_ranks_than_heads_of_keys(workers: WorkerPool) -> None:
    check(workers, "llama", {"tp": 4})
    check(workers, "qwen3", {"tp": 4}, tensor_parallel="derived", sequence_parallel=True)


def exchanged_by(blocks: int, sequence: bool) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Collectives of the captured forward and backward of a microbatch, and of a step of two."""
    batch = batch_of("llama")
    model = af.from_module(model_of("llama", num_hidden_layers=blocks), batch)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    pipe = af.pipeline(af.split(model, 1), s, mesh=mesh_of(tp=4), sharding=af.Sharding(sequence_parallel=sequence))
    params = pipe.init()
    stage = plan_of(pipe, params, batch).functions[0]
    counts = []
    for piece in (stage.pieces.forward, stage.pieces.backward):
        kinds = (kind_of(node.target) for node in in_order(piece, list(stage.joint.graph.nodes)))
        counts.append(dict(Counter(kind for kind in kinds if kind)))
    af.value_and_grad(pipe)(params, batch)
    with Counting() as counting:
        af.value_and_grad(pipe)(params, batch)
    return counts[0], counts[1], dict(counting.found)


@pytest.mark.parametrize("sequence", [False, True])
def test_exchanges_of_a_block(workers: WorkerPool, sequence: bool) -> None:
    two, one = (workers.run(exchanged_by, blocks, sequence)[0] for blocks in (2, 1))
    each = {"all_gather": 2, "reduce_scatter": 2} if sequence else {"all_reduce": 2}
    assert more(two[0], one[0]) == more(two[1], one[1]) == each, "in the program, forward and backward"
    assert more(two[2], one[2]) == {kind: 2 * 2 * count for kind, count in each.items()}, "in a run of two microbatches"


def saved(name: str, axes: dict[str, int], path: Path) -> dict[str, torch.Tensor]:
    """Train a step and save; all parameters as they are then, and slots of the first."""
    pipe, optimizer = pipe_for(name, axes), af.optimizer(torch.optim.AdamW, lr=1e-2)
    params = pipe.init()
    _, grads = af.value_and_grad(pipe)(params, batch_of(name), key=(0, 0))
    params, state = optimizer.update(grads, optimizer.init(params), params)
    af.save(path, params=params, optimizer_state=state)
    return whole_of(pipe, params, state)


def loaded(name: str, axes: dict[str, int] | None, path: Path) -> dict[str, torch.Tensor]:
    pipe = pipe_for(name, axes)
    found = af.load(path, pipe, optimizer=af.optimizer(torch.optim.AdamW, lr=1e-2))
    return whole_of(pipe, found.params, found.optimizer_state)


def pipe_for(name: str, axes: dict[str, int] | None) -> af.Pipeline:
    pp = (axes or {}).get("pp", 1)
    stages = af.split(af.from_module(model_of(name), batch_of(name)), pp)
    s = af.schedule.build("1f1b", num_ranks=pp, num_microbatches=2)
    return af.pipeline(stages, s, mesh=None if axes is None else mesh_of(**axes))


def whole_of(pipe: af.Pipeline, params: Any, state: Any) -> dict[str, torch.Tensor]:
    slots = flatten(pipe.gather(state["exp_avg"]))
    gathered = {**flatten(pipe.gather(params)), **{f"exp_avg.{path}": leaf for path, leaf in slots.items()}}
    return {path: leaf.clone() for path, leaf in gathered.items()}


@pytest.mark.parametrize("axes", [{"pp": 2, "tp": 2}, pytest.param({"dp_shard": 2, "tp": 2}, marks=pytest.mark.full)])
def test_checkpoints_have_fused_weights_in_order(workers: WorkerPool, tmp_path: Path, axes: dict[str, int]) -> None:
    """One process reads what tp ranks wrote, and the reverse."""
    name = "phi3"
    full = workers.run(saved, name, axes, tmp_path / "there")[0]
    for found in (loaded(name, None, tmp_path / "there"), workers.run(loaded, name, axes, tmp_path / "there")[0]):
        assert found.keys() == full.keys()
        assert all(torch.equal(found[path], leaf) for path, leaf in full.items())
    moved = (
        full["model.layers.0.self_attn.qkv_proj.weight"]
        - flatten(af.from_module(model_of(name), batch_of(name)).init())["model.layers.0.self_attn.qkv_proj.weight"]
    )
    assert moved.abs().max() < 0.02, "each row is where it was"


def shifted(outputs: Any, microbatch: Any) -> torch.Tensor:
    """A loss as users write it, unaware of ranks."""
    logits, labels = outputs.logits[:, :-1], microbatch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def step_with(loss: Any, axes: dict[str, int] | None, engine: str) -> tuple[float, dict[str, torch.Tensor], dict[str, int]]:
    """Loss and gradients of the logits of a Llama; and what is exchanged in a step of a process."""
    batch = batch_of("llama")
    model = af.from_module(model_of("llama"), batch, inputs=["input_ids"])
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    mesh = None if axes is None else mesh_of(**axes)
    pipe = af.pipeline(af.split(model, 1), s, loss=loss, mesh=mesh, engine=engine)
    params = pipe.init()
    value, grads = af.value_and_grad(pipe)(params, batch)
    with Counting() as counting:
        af.value_and_grad(pipe)(params, batch)
    assert pipe(params, batch).item() == pytest.approx(value.item(), rel=1e-6)
    assert pipe.forward(params, batch).logits.shape == (4, 8, 32), "all of them, to whoever asks"
    return value.item(), {path: leaf.clone() for path, leaf in flatten(pipe.gather(grads)).items()}, dict(counting.found)


@pytest.mark.parametrize(
    ("loss", "engine"),
    [
        (af.losses.causal_lm, "graph"),
        (shifted, "graph"),
        *(pytest.param(loss, "eager", marks=pytest.mark.full) for loss in (af.losses.causal_lm, shifted)),
    ],
)
def test_losses_of_logits(workers: WorkerPool, loss: Any, engine: str) -> None:
    """Logits cut along the vocabulary are not gathered for `causal_lm`."""
    value, grads, _ = step_with(loss, None, "graph")
    for found, others, exchanged in workers.run(step_with, loss, {"tp": 4}, engine):
        assert found == pytest.approx(value, rel=1e-5)
        for path, grad in grads.items():
            torch.testing.assert_close(others[path], grad, rtol=1e-4, atol=1e-6, msg=path)
        assert loss is shifted or "all_gather" not in exchanged
