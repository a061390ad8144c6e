"""How a process holds its parameters: trees stay arguments, whatever their storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import autofunc as af
from autofunc.errors import AutofuncError, MeshError, ModelError
from autofunc.mesh import data_coordinate
from autofunc.model import cut_dims
from autofunc.tree import flatten
from stages.gpt2 import TENSOR_PARALLEL, build_gpt2_model
from tests.cases import assert_same_tree, cut_evenly, make_case, mesh_of, plan_of, squared_error
from tests.pool import WorkerPool

SIZES: dict[str, int] = {"vocab_size": 18, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}


def pipe_on(mesh: Any, **options: Any) -> tuple[Any, af.Model, dict[str, Any]]:
    model = build_gpt2_model(**SIZES)
    s = af.schedule.build("1f1b", num_ranks=mesh["pp"].size(), num_microbatches=2)
    pipe = af.pipeline(
        cut_evenly(model, s.num_stages), s, loss=af.losses.causal_lm, mesh=mesh, sharding=af.Sharding(**options)
    )
    place, places = data_coordinate(mesh)
    ids = torch.randint(0, 18, (4 * places, 7), generator=torch.Generator().manual_seed(0)).chunk(places)[place]
    return pipe, model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def trees(sizes: dict[str, int]) -> None:
    pipe, model, batch = pipe_on(mesh_of(**sizes))
    full = model.init(seed=5)
    params = pipe.init(seed=5)
    assert_same_tree(full, pipe.gather(params))
    assert_same_tree(full, pipe.gather(pipe.place(full)))
    step = af.value_and_grad(pipe)
    first_loss, first = step(params, batch)
    for path, leaf in flatten(first).items():
        given = flatten(params)[path]
        assert type(leaf) is type(given) and leaf.shape == given.shape and leaf.dtype == given.dtype
        if isinstance(leaf, DTensor):
            assert leaf.placements == given.placements and leaf.device_mesh == given.device_mesh
    assert_same_tree(full, pipe.gather(params))  # unchanged
    # other trees, one after the other, do not disturb each other
    doubled, other = params + params, pipe.init(seed=6)
    for tree in (doubled, other, pipe.place(full), doubled + other):
        step(tree, batch)
        pipe(tree, batch)
    again_loss, again = step(params, batch)
    assert torch.equal(first_loss, again_loss)
    assert_same_tree(pipe.gather(first), pipe.gather(again))
    assert_same_tree(full, pipe.gather(params))
    assert_same_tree(full + full, pipe.gather(doubled))
    assert torch.equal(step(doubled, batch)[0], step(pipe.place(full + full), batch)[0])
    assert torch.equal(pipe(params, batch), first_loss), "forward only"
    assert_same_tree(pipe.gather(first + first), pipe.gather(first) + pipe.gather(first))


@pytest.mark.parametrize(
    "sizes",
    [
        {"pp": 2, "dp_shard": 2},
        {"dp_shard": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        pytest.param({"dp_shard": 4}, marks=pytest.mark.full),
        pytest.param({"pp": 2, "dp_replicate": 2}, marks=pytest.mark.full),
        pytest.param({"dp_replicate": 2, "tp": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_trees_are_arguments(workers: WorkerPool, sizes: dict[str, int]) -> None:
    workers.run(trees, sizes)


def outputs(sizes: dict[str, int], options: dict[str, Any]) -> None:
    """Forward only: this dp coordinate's rows, whole over tp."""
    pipe, model, batch = pipe_on(mesh_of(**sizes), **options)
    params = pipe.init(seed=5)
    expected = model(model.init(seed=5), batch)
    found = pipe.forward(params, batch, gather="all")
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True, "reshard_after_forward": True}], ids=str)
def test_outputs(workers: WorkerPool, options: dict[str, Any]) -> None:
    workers.run(outputs, {"pp": 2, "tp": 2}, options)
    workers.run(outputs, {"dp_shard": 2, "tp": 2}, options)


def held_over_tp() -> list[tuple[int, int]]:
    """(bytes in memory, bytes needed) of each parameter."""
    pipe, _, _ = pipe_on(mesh_of(dp_replicate=2, tp=2))
    parts = [leaf.to_local() for leaf in flatten(pipe.init()).values()]
    return [(part.untyped_storage().nbytes(), part.numel() * part.element_size()) for part in parts]


def test_a_part_does_not_hold_the_whole(workers: WorkerPool) -> None:
    assert all(held == needed for held, needed in workers.run(held_over_tp)[0])


def outside_the_vocabulary() -> bool:
    pipe, _, batch = pipe_on(mesh_of(dp_replicate=2, tp=2))
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, 0] = 18
    return bool(pipe(pipe.init(), batch).isnan())


def test_a_label_outside_the_vocabulary_is_detected(workers: WorkerPool) -> None:
    assert all(workers.run(outside_the_vocabulary))


def other_reductions() -> None:
    """Reductions over a dim that is cut, other than sums."""

    def apply(p: Any, x: Any, batch: Any) -> Any:
        h = af.constrain(batch["x"] @ p["w"].t(), "shard(1)")
        low, high = h.amin(-1, keepdim=True), h.amax(-1, keepdim=True)
        return af.constrain(low, "replicate") * 2 + af.constrain(high, "replicate") + h.mean(-1, keepdim=True)

    layer = af.Layer(lambda key: {"w": key.normal("w", (4, 3))}, apply)
    model = af.Model({"only": layer}, tensor_parallel=af.TensorParallel({"*.w": "shard(0)"}))
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=1)
    pipe = af.pipeline(af.split(model), s, loss=squared_error, mesh=mesh_of(dp_replicate=2, tp=2))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    found = pipe.forward(pipe.init(), {"x": x, "y": torch.zeros(2, 1)})
    torch.testing.assert_close(found, model(model.init(), {"x": x}))


def test_reductions_over_cut_values(workers: WorkerPool) -> None:
    workers.run(other_reductions)


def built_ahead(sizes: dict[str, int]) -> int:
    pipe, _, batch = pipe_on(mesh_of(**sizes))
    pipe.build(batch)
    af.value_and_grad(pipe)(pipe.init(), batch)
    return len(pipe._plans)


def test_plans_built_ahead_are_used(workers: WorkerPool) -> None:
    assert workers.run(built_ahead, {"dp_shard": 2, "tp": 2}) == [1] * 4


def boundary(options: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of what stage 0 sends, and of what it is to the pipeline on one process."""
    pipe, _, batch = pipe_on(mesh_of(pp=2, tp=2), **options)
    plan = plan_of(pipe, pipe.init(), batch)
    (value,) = plan.boundaries.stages[0].values
    ((_, program),) = plan.programs.items()
    assert set(program.slots) == {(value.shape, value.dtype)}, "what either rank receives: it, or its gradient"
    return value.shape, (2, 6, 8)


def test_values_between_stages_are_cut_over_tp(workers: WorkerPool) -> None:
    for found, whole in workers.run(boundary, {}):
        assert found == whole
    for (rows, tokens, width), whole in workers.run(boundary, {"sequence_parallel": True}):
        assert (rows, 2 * tokens, width) == whole


OWN_TABLE = {"blocks.*.up.*": "shard(0)", "blocks.*.down.weight": "shard(1)"}


def own_table(engine: str) -> None:
    """A model without marks and without a table of its own."""
    mesh = mesh_of(dp_shard=2, tp=2)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    model, stages, loss, batch = make_case("mlp", 1, 8)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(model.init(), batch, (0, 1))
    pipe = af.pipeline(
        stages, s, loss=loss, mesh=mesh, engine=engine, sharding=af.Sharding(tensor_parallel=OWN_TABLE)
    )  # fmt: skip
    place, places = data_coordinate(mesh)
    rows = {key: leaf.chunk(places)[place] for key, leaf in batch.items()}
    found_loss, found = af.value_and_grad(pipe)(pipe.init(), rows, (0, 1))
    torch.testing.assert_close(found_loss, expected_loss)
    for path, leaf in flatten(pipe.gather(found)).items():
        torch.testing.assert_close(leaf, flatten(expected)[path], msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_a_table_for_a_custom_model(workers: WorkerPool, engine: str) -> None:
    workers.run(own_table, engine)


def aux_over_ranks(sizes: dict[str, int]) -> tuple[Any, ...]:
    """Aux of all data parallel ranks, and rows that count differently."""

    @af.losses.reduce_aux(rows="cat", most="max", mean="mean")
    def loss(out: Any, microbatch: Any) -> Any:
        weight = microbatch["x"].new_tensor(float(len(microbatch["x"])))
        x = microbatch["x"][:, 0]
        return (out - x[:, None]).square().sum(), weight, {"rows": x, "most": x.amax(), "mean": x.mean(), "sum": x.sum()}

    model = af.Model(
        {
            name: af.Layer(
                lambda key: {"w": key.normal("w", (3, 3))}, lambda p, x, b: (b["x"] if x is None else x) @ p["w"]
            )
            for name in ("a", "b")
        }
    )
    mesh = mesh_of(**sizes)
    s = af.schedule.build("1f1b", num_ranks=mesh["pp"].size(), num_microbatches=2)
    pipe = af.pipeline(af.split(model, mesh["pp"].size()), s, loss=loss, mesh=mesh)
    place, places = data_coordinate(mesh)
    x = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    (value, aux), grads = af.value_and_grad(pipe, has_aux=True)(pipe.init(), {"x": x.chunk(places)[place]})
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2 * places)(model.init(), {"x": x})
    torch.testing.assert_close(value, expected_loss)
    for path, leaf in flatten(pipe.gather(grads)).items():
        torch.testing.assert_close(leaf, flatten(expected)[path])
    return tuple(aux[name].tolist() for name in ("rows", "most", "mean", "sum"))


def test_aux_is_combined_over_data_parallel_ranks(workers: WorkerPool) -> None:
    for sizes in ({"pp": 2, "dp_replicate": 2}, {"dp_replicate": 2, "dp_shard": 2}):
        for found in workers.run(aux_over_ranks, sizes):
            assert found == (list(map(float, range(8))), 7.0, 3.5, 28.0)


def unused_parameter() -> None:
    """A parameter without a cotangent on some ranks: no rank waits for it."""

    def apply(p: Any, x: Any, batch: Any) -> Any:
        return batch["x"] @ p["w"]  # never p["idle"]

    layer = af.Layer(lambda key: {"w": key.normal("w", (3, 2)), "idle": key.normal("idle", (4,))}, apply)
    mesh = mesh_of(dp_shard=4)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=1)
    for engine in ("graph", "eager"):
        pipe = af.pipeline(af.split(af.Model({"only": layer})), s, loss=squared_error, mesh=mesh, engine=engine)
        batch = {"x": torch.ones(2, 3), "y": torch.ones(2, 2)}
        _, grads = af.value_and_grad(pipe)(pipe.init(), batch)
        assert flatten(pipe.gather(grads))["only.idle"].count_nonzero() == 0


def test_a_parameter_without_a_cotangent(workers: WorkerPool) -> None:
    workers.run(unused_parameter)


def foreign_parameters() -> str:
    pipe, model, batch = pipe_on(mesh_of(dp_shard=4))
    with pytest.raises(ModelError) as caught:
        af.value_and_grad(pipe)(model.init(), batch)
    return str(caught.value)


def test_parameters_of_another_layout_are_refused(workers: WorkerPool) -> None:
    message = workers.run(foreign_parameters)[0]
    assert "expected a DTensor over the mesh" in message and "pipe.place" in message


def wrong_mesh() -> str:
    ranks = torch.arange(4).view(2, 2)
    with pytest.raises(MeshError) as caught:
        pipe_on(DeviceMesh("cpu", ranks, mesh_dim_names=("pp", "model")))
    return str(caught.value)


def test_an_unknown_axis(workers: WorkerPool) -> None:
    assert "axis 'model'" in workers.run(wrong_mesh)[0]


# --- placement tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "table", "message"),
    [
        ({"n_head": 1}, {}, "tp=2 does not divide n_head=1"),
        ({"vocab_size": 17}, {}, "tp=2 does not divide vocab_size=17"),
        ({"n_inner": 9}, {}, "tp=2 does not divide dim 0 of parameter 'h.0.mlp.fc.bias'"),
        ({}, {"h.*.atn.q.weight": "shard(0)"}, "'h.*.atn.q.weight' matches no parameter; did you mean"),
        ({}, {"*.ln_1.weight": "shard(1)"}, "shard(1) for 'h.0.ln_1.weight', which has shape"),
        ({}, {"*.ln_1.weight": "rows"}, "unknown placement 'rows'; expected 'replicate' or 'shard(0)'"),
    ],
)
def test_invalid_tables_are_refused(change: dict[str, int], table: dict[str, str], message: str) -> None:
    model = build_gpt2_model(**(SIZES | change))
    assert model.tensor_parallel is not None
    canonical = {path: leaf for path, leaf in model.spec.items() if path not in model.ties}
    with pytest.raises((ModelError, MeshError)) as caught:
        rules = af.TensorParallel({**table, **TENSOR_PARALLEL}, model.tensor_parallel.divisible)
        cut_dims(rules, canonical, 2)
    assert message in str(caught.value)


def test_constrain_refuses_unknown_placements() -> None:
    with pytest.raises(ModelError, match="unknown placement 'shard'"):
        af.constrain(torch.ones(2), "shard")
    x = torch.ones(2)
    assert af.constrain(x, "sequence") is x and af.constrain(x, "shard(0)") is x


def scaled() -> tuple[af.Model, dict[str, torch.Tensor]]:
    """Two layers with a scale, which has no dims."""

    def layer(first: bool) -> af.Layer:
        return af.Layer(
            lambda key: {"weight": key.normal("weight", (4, 4)), "scale": key.ones("scale", ())},
            lambda params, x, batch: torch.tanh((batch["x"] if first else x) @ params["weight"]) * params["scale"],
        )

    batch = {name: torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("xy")}
    return af.Model({"a": layer(True), "b": layer(False)}), batch


def without_dims(sizes: dict[str, int]) -> tuple[Any, ...]:
    model, batch = scaled()
    mesh = mesh_of(**sizes)
    place, places = data_coordinate(mesh)
    mine = {name: value.chunk(places)[place] for name, value in batch.items()}
    s = af.schedule.build("1f1b", num_ranks=mesh["pp"].size(), num_microbatches=2)
    pipe = af.pipeline(cut_evenly(model, s.num_stages), s, loss=squared_error, mesh=mesh)
    params = pipe.init()
    assert_same_tree(model.init(), pipe.gather(params))
    assert_same_tree(model.init(), pipe.gather(pipe.place(model.init())))
    loss, grads = af.value_and_grad(pipe)(params, mine)
    opt = af.optimizer(torch.optim.AdamW, lr=0.1)
    params, _ = opt.update(grads, opt.init(params), params)
    after, _ = af.value_and_grad(pipe)(params, mine)
    return loss, pipe.gather(grads), after


@pytest.mark.parametrize("sizes", [{"pp": 2, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}], ids=str)
def test_parameters_without_dims(workers: WorkerPool, sizes: dict[str, int]) -> None:
    model, batch = scaled()
    params = model.init()
    reference = af.reference_value_and_grad(model, squared_error, 2)
    expected_loss, expected = reference(params, batch)
    opt = af.optimizer(torch.optim.AdamW, lr=0.1)
    params, _ = opt.update(expected, opt.init(params), params)
    for loss, grads, after in workers.run(without_dims, sizes):
        torch.testing.assert_close(loss, expected_loss)
        for path, leaf in flatten(grads).items():
            torch.testing.assert_close(leaf, flatten(expected)[path])
        torch.testing.assert_close(after, reference(params, batch)[0])


def refused_twice() -> list[str]:
    """Return the errors for a batch whose tokens tp does not divide, twice; and the loss of a valid one on another mesh."""
    said = []
    for sizes, tokens in (((2, 1, 1, 2), 5), ((2, 1, 1, 2), 5), ((1, 1, 2, 2), 6)):
        mesh = mesh_of(sizes[0], dp_shard=sizes[2], tp=sizes[3])
        model = build_gpt2_model(**SIZES)
        s = af.schedule.build("1f1b", num_ranks=sizes[0], num_microbatches=2)
        pipe = af.pipeline(
            cut_evenly(model, sizes[0]), s, loss=af.losses.causal_lm, mesh=mesh, engine="eager",
            sharding=af.Sharding(sequence_parallel=True),
        )  # fmt: skip
        ids = torch.arange(4 * tokens).view(4, tokens) % 18
        try:
            af.value_and_grad(pipe)(pipe.init(), {"input_ids": ids, "labels": ids})
            said.append("")
        except AutofuncError as error:
            said.append(str(error))
    return said


def test_a_refused_stage_leaves_nothing_behind(workers: WorkerPool) -> None:
    """A mask of the embedding stayed in torch's caches, and the next one was compared with it."""
    for first, second, third in workers.run(refused_twice):
        assert "tokens equally; use " in first
        assert second == first and not third


def timeouts() -> set[float]:
    from autofunc.mesh import timeout_of
    from autofunc.runtime import pair_groups

    mesh = mesh_of(pp=2, dp_shard=2)
    pipe, _, batch = pipe_on(mesh)
    af.value_and_grad(pipe)(pipe.init(), batch)
    backends = [group.backend for group in pair_groups._known[mesh["pp"].get_group()].groups.values()]
    groups = [each.get_group(axis) for each in (mesh, mesh_of(pp=2, cp=2)) for axis in each.mesh_dim_names or ()]
    return {each.total_seconds() for each in (*(b.options._timeout for b in backends), *map(timeout_of, groups))}


def test_all_groups_have_the_default_timeout(workers: WorkerPool) -> None:
    (expected,) = set(map(frozenset, workers.run(timeouts)))
    assert len(expected) == 1 and expected != {1800.0}, "torch gives those of axes half an hour"
