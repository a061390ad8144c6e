"""Experts spread over data parallel ranks: losses, gradients and weights equal those of one process with all rows."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.engine.partition import in_order
from autofunc.errors import AutofuncError, MeshError, ModelError
from autofunc.mesh import data_coordinate
from autofunc.shard.experts import check_experts
from autofunc.tree import flatten
from stages.moe import build_moe_model, moe_causal_lm
from tests.cases import assert_same_tree, cut_evenly, make_case, mesh_of, plan_of
from tests.pool import WorkerPool

Sizes = dict[str, int]

LOSS = partial(moe_causal_lm, router_aux_loss_coef=0.1)
MICROBATCHES, ROWS = 2, 2  # of each rank
STEPS = 5


def small(blocks: int = 2) -> af.Model:
    return build_moe_model(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip


def batches(places: int) -> list[dict[str, Tensor]]:
    """Make batches for all ranks together, one per step."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 17, (STEPS, places * MICROBATCHES * ROWS, 6), generator=generator)
    labels = ids[..., 1:].clone()
    labels[:, ::3, -2:] = -100
    return [{"input_ids": each[:, :-1], "labels": label} for each, label in zip(ids, labels, strict=True)]


def joined(batch: dict[str, Tensor], places: int, size: int) -> dict[str, Tensor]:
    """The rows in another order: a microbatch has those of a microbatch of all ranks that share experts."""

    def order(rows: Tensor) -> Tensor:
        return rows.view(places // size, size, MICROBATCHES, ROWS, *rows.shape[1:]).transpose(1, 2).flatten(0, 3)

    return {name: order(rows) for name, rows in batch.items()}


def pipe_on(sizes: Sizes, size: int, schedule: str = "1f1b", engine: str = "graph", **options: Any) -> af.Pipeline:
    mesh = mesh_of(**sizes)
    s = af.schedule.build(schedule, num_ranks=sizes.get("pp", 1), num_microbatches=MICROBATCHES)
    sharding = af.Sharding(expert_parallel=size, **options)
    return af.pipeline(cut_evenly(small(), s.num_stages), s, loss=LOSS, mesh=mesh, engine=engine, sharding=sharding)


def mine(batch: dict[str, Tensor], pipe: af.Pipeline) -> dict[str, Tensor]:
    """The rows of this rank."""
    place, places = data_coordinate(pipe.mesh)
    return {name: rows.chunk(places)[place] for name, rows in batch.items()}


def trained(sizes: Sizes, size: int, *how: str, **options: Any) -> Any:
    """Losses of all steps, the first gradients and their norm, and the weights afterwards."""
    pipe = pipe_on(sizes, size, *how, **options)
    params = pipe.init(seed=1)
    opt = af.optimizer(torch.optim.AdamW, lr=0.01)
    state, losses, first = opt.init(params), [], None
    assert_same_tree(small().init(seed=1), pipe.gather(params))
    for batch in batches(data_coordinate(pipe.mesh)[1]):
        loss, grads = af.value_and_grad(pipe)(params, mine(batch, pipe))
        first = first or (pipe.gather(grads), pipe.global_norm(grads))
        losses.append(loss)
        grads, _ = pipe.clip(grads, 1.0)
        params, state = opt.update(grads, state, params)
    return losses, first, pipe.gather(params)


def expected(places: int, size: int) -> Any:
    reference = af.reference_value_and_grad(small(), LOSS, places * MICROBATCHES // size)
    params = small().init(seed=1)
    opt = af.optimizer(torch.optim.AdamW, lr=0.01)
    state, losses, first = opt.init(params), [], None
    for batch in batches(places):
        loss, grads = reference(params, joined(batch, places, size))
        norm = torch.stack([leaf.double().square().sum() for leaf in flatten(grads).values()]).sum().sqrt()
        first = first or (grads, norm.float())
        losses.append(loss)
        params, state = opt.update(grads * min(1.0, (1.0 / (norm + 1e-6)).item()), state, params)
    return losses, first, params


@pytest.mark.parametrize(
    ("sizes", "size", "how"),
    [
        ({"dp_shard": 4}, 2, ()),
        ({"pp": 2, "dp_shard": 2}, 2, ("zb_h1",)),
        ({"dp_shard": 4}, 4, ("1f1b", "eager")),
        pytest.param({"dp_replicate": 2, "dp_shard": 2}, 2, (), marks=pytest.mark.full),
        pytest.param({"pp": 2, "dp_shard": 2}, 2, ("zbv",), marks=pytest.mark.full),
        pytest.param({"pp": 2, "dp_shard": 2}, 2, ("1f1b", "eager"), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_training_follows_one_process(workers: WorkerPool, sizes: Sizes, size: int, how: tuple[str, ...]) -> None:
    places = sizes.get("dp_replicate", 1) * sizes["dp_shard"]
    losses, (grads, norm), params = expected(places, size)
    for found_losses, (found_grads, found_norm), found in workers.run(trained, sizes, size, *how):
        torch.testing.assert_close(torch.stack(found_losses), torch.stack(losses), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found_norm, norm, rtol=1e-5, atol=1e-6)
        for wanted, have in ((grads, found_grads), (params, found)):
            for path, leaf in flatten(wanted).items():
                torch.testing.assert_close(
                    flatten(have)[path], leaf, rtol=1e-5, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}"
                )


# --- captured modules


def captured(name: str) -> tuple[af.Model, Any]:
    from tests.captured.test_routed_experts import built, text

    model = af.from_module(built(name), masked(name, text(ROWS)["input_ids"]))
    names = list(model.layers)
    return model, lambda number: af.split(model, [name for name in names if name.endswith("layers.1")][: number - 1])


def masked(name: str, ids: Tensor) -> dict[str, Tensor]:
    """A batch; of the module that has a balance loss with padding, which that leaves out: rows count differently."""
    batch = {"input_ids": ids, "labels": ids}
    return {**batch, "attention_mask": (ids.cumsum(-1) < 60).long()} if name == "Mixtral" else batch


def captured_steps(sizes: Sizes | None, size: int, name: str, engine: str = "graph") -> Any:
    """Losses of some steps of AdamW, and the weights afterwards; without sizes those of one process.

    Its microbatches have the rows of both ranks: the loss of Mixtral has means over all of them.
    """
    model, split = captured(name)
    places = 2
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 23, (3, places * MICROBATCHES * ROWS, 6), generator=generator)
    opt = af.optimizer(torch.optim.AdamW, lr=0.01)
    if sizes is None:
        value_and_grad = af.reference_value_and_grad(model, None, MICROBATCHES)
        params = model.init()
        ids = ids.view(3, places, MICROBATCHES, ROWS, 6).transpose(1, 2).reshape(ids.shape)
    else:
        s = af.schedule.build("1f1b", num_ranks=sizes.get("pp", 1), num_microbatches=MICROBATCHES)
        mesh = mesh_of(**sizes)
        pipe = af.pipeline(split(s.num_stages), s, mesh=mesh, engine=engine, sharding=af.Sharding(expert_parallel=size))
        value_and_grad, params = af.value_and_grad(pipe), pipe.init()
        ids = ids.chunk(places, 1)[data_coordinate(mesh)[0]]
    state, losses = opt.init(params), []
    for rows in ids:
        loss, grads = value_and_grad(params, masked(name, rows))
        losses.append(loss)
        params, state = opt.update(grads, state, params)
    return losses, params if sizes is None else pipe.gather(params)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("Mixtral", "graph"), ("DeepseekV3", "graph"),
        *(pytest.param(name, "graph", marks=pytest.mark.full) for name in ("Qwen3Moe", "Olmoe", "GptOss")),
        *(pytest.param(name, "eager", marks=pytest.mark.full) for name in ("Mixtral", "Qwen3Moe", "GptOss")),
    ],
)  # fmt: skip
def test_captured_modules_follow_one_process(workers: WorkerPool, name: str, engine: str) -> None:
    losses, params = captured_steps(None, 1, name)
    for found_losses, found in workers.run(captured_steps, {"pp": 2, "dp_shard": 2}, 2, name, engine):
        torch.testing.assert_close(torch.stack(found_losses), torch.stack(losses), rtol=1e-5, atol=1e-6)
        for path, leaf in flatten(params).items():
            torch.testing.assert_close(flatten(found)[path], leaf, rtol=1e-5, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")


# --- what is sent, and what is held


def exchanges(blocks: int) -> list[dict[str, int]]:
    """Operators of the forward, I and W of a stage of some blocks that other ranks take part in; by the last rank."""
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=MICROBATCHES)
    mesh, stages = mesh_of(pp=2, dp_shard=2), af.split(small(blocks + 1), ["layers.1"])
    pipe = af.pipeline(stages, s, loss=LOSS, mesh=mesh, sharding=af.Sharding(expert_parallel=2))
    stage: Any = plan_of(pipe, pipe.init(), mine(batches(2)[0], pipe)).functions.get(1)
    if stage is None:
        return []
    order = list(stage.joint.graph.nodes)
    pieces = (stage.pieces.forward, stage.pieces.backward_input, stage.pieces.backward_weight)
    talks = ("dispatch", "combine", "expert_counts", "expert_sum")
    found = []
    for piece in pieces:
        names = (str(node.target).split(".")[1] for node in in_order(piece, order) if "autofunc" in str(node.target))
        found.append(dict(Counter(name for name in names if name in talks)))
    return found


def test_a_layer_has_two_exchanges_forward_and_two_backward(workers: WorkerPool) -> None:
    two, one = (workers.run(exchanges, blocks)[-1] for blocks in (2, 1))
    forward, backward, weights = (
        {name: count - before.get(name, 0) for name, count in after.items()} for after, before in zip(two, one, strict=True)
    )
    assert forward == {"dispatch": 1, "combine": 1, "expert_counts": 1, "expert_sum": 1}
    assert backward == {"dispatch": 1, "combine": 1, "expert_sum": 1}
    assert weights == {}, "W waits for nobody"


def held() -> dict[str, tuple[int, ...]]:
    params = pipe_on({"dp_shard": 4}, 2).init()
    return {path: tuple(leaf.to_local().shape) for path, leaf in flatten(params).items()}


def test_a_rank_holds_its_part_of_its_experts(workers: WorkerPool) -> None:
    for shapes in workers.run(held):
        assert shapes["layers.0.mlp.experts.gate_proj"] == (1, 12, 8), "of four experts two, shared by two ranks"
        assert shapes["layers.0.mlp.experts.down_proj"] == (1, 8, 12)
        assert shapes["layers.0.mlp.gate.weight"] == (1, 8), "as all others, by four"


def other_policies() -> list[Any]:
    """Losses, and first gradients, of a step: as it is, gathered for each use, and with parameters in bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = []
    for options in ({}, {"reshard_after_forward": True}, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16)}):
        pipe = pipe_on({"pp": 2, "dp_shard": 2}, 2, **options)
        loss, grads = af.value_and_grad(pipe)(pipe.init(seed=1), mine(batches(2)[0], pipe))
        found.append((loss, pipe.gather(grads)))
    return found


def test_policies(workers: WorkerPool) -> None:
    for plain, again, half in workers.run(other_policies):
        assert torch.equal(plain[0], again[0])
        assert_same_tree(plain[1], again[1])
        assert 0 < abs(half[0] - plain[0]) < 0.05 * plain[0]


def stored(folder: str) -> tuple[Any, Any]:
    """Trained by ranks that share experts by twos, and what those that share them by fours read of it."""
    pipe = pipe_on({"dp_shard": 4}, 2)
    params, opt = pipe.init(seed=1), af.optimizer(torch.optim.AdamW, lr=0.01)
    state = opt.init(params)
    _, grads = af.value_and_grad(pipe)(params, mine(batches(4)[0], pipe))
    params, state = opt.update(grads, state, params)
    af.save(f"{folder}/checkpoint", params=params, optimizer_state=state)
    others = pipe_on({"pp": 2, "dp_shard": 2}, 2)
    found = af.load(f"{folder}/checkpoint", others, optimizer=opt)
    assert_same_tree(pipe.gather(params), others.gather(found.params))
    return pipe.gather(params), pipe.gather(state["exp_avg"])


def test_checkpoints_know_no_layout(workers: WorkerPool, tmp_path: Path) -> None:
    params, moments = workers.run(stored, str(tmp_path))[0]
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=MICROBATCHES)
    pipe = af.pipeline(af.split(small()), s, loss=LOSS)
    found = af.load(tmp_path / "checkpoint", pipe, optimizer=af.optimizer(torch.optim.AdamW, lr=0.01))
    assert_same_tree(params, found.params)
    assert_same_tree(moments, found.optimizer_state["exp_avg"])


@pytest.mark.parametrize(
    ("size", "dp_shard", "tp", "message"),
    [
        (3, 4, 1, r"expert_parallel=3 does not divide dp_shard=4, among .*; 1, 2 and 4 do"),
        (6, 12, 1, r"expert_parallel=6 does not divide the 4 experts of 'layers.0.mlp.experts.down_proj'; 1, 2 and 4 do"),
        (3, 3, 1, r"does not divide the 4 experts of .*; only 1 does"),
        (2, 2, 2, r"expert_parallel=2 and tp=2: .*; use tp=1"),
    ],
)
def test_invalid_sizes_are_refused(size: int, dp_shard: int, tp: int, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        check_experts(small(), size, dp_shard, tp)


def test_models_without_experts() -> None:
    with pytest.raises(MeshError, match=r"has no routed experts whose parameters are known; use 1, or af\.routed_experts"):
        check_experts(make_case("gpt2", 1, 4)[0], 2, 2)
    with pytest.raises(ModelError, match=r"experts pattern '\*.expert' matches no parameter"):
        check_experts(af.Model(make_case("gpt2", 1, 4)[0].layers, experts=["*.expert"]), 2, 2)
    with pytest.raises(AutofuncError, match="expert_parallel=0, expected 1 or more"):
        af.Sharding(expert_parallel=0)


def beside_cp() -> str:
    with pytest.raises(MeshError) as error:
        pipe_on({"dp_shard": 2, "cp": 2}, 2)
    return str(error.value)


def test_ranks_that_share_tokens_have_all_experts(workers: WorkerPool) -> None:
    for said in workers.run(beside_cp):
        assert said.startswith("the mesh has cp=2, and expert_parallel=2; ")


def test_without_a_mesh_memory_is_predicted() -> None:
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=MICROBATCHES)
    batch, kept = {name: rows[: MICROBATCHES * ROWS] for name, rows in batches(1)[0].items()}, {}
    for size in (1, 2, 4):
        pipe = af.pipeline(af.split(small()), s, loss=LOSS, sharding=af.Sharding(expert_parallel=size))
        (stage,) = pipe.memory(pipe.init(device="meta"), batch)
        kept[size] = stage.residuals
    assert kept[2] - kept[1] > 0.2 * kept[1]
    assert kept[4] - kept[2] == pytest.approx(2 * (kept[2] - kept[1]), rel=0.01), "for twice as many rows of experts"
    with pytest.raises(AutofuncError, match="expert_parallel needs a mesh"):
        af.value_and_grad(pipe)(pipe.init(), batch)
