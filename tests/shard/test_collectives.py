"""Number of collectives: counted in the captured program, and in a run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import autofunc as af
from autofunc.engine.partition import in_order
from autofunc.runtime.ops import Backward, BackwardInput, BackwardWeight, Forward
from autofunc.runtime.plan import Mode
from autofunc.schedule import Kind
from stages.gpt2 import build_gpt2_model
from stages.llama import build_llama_model
from tests.cases import mesh_of, plan_of
from tests.pool import WorkerPool

Counts = dict[str, int]


def model_of(name: str, blocks: int) -> af.Model:
    if name == "gpt2":
        return build_gpt2_model(vocab_size=18, n_positions=8, n_embd=8, n_layer=blocks, n_head=2)
    return build_llama_model(
        vocab_size=18, hidden_size=8, intermediate_size=12, num_hidden_layers=blocks, num_attention_heads=2
    )


def pipe_of(name: str, blocks: int, microbatches: int, engine: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """On a mesh of dp_shard=2, tp=2."""
    mesh = mesh_of(dp_shard=2, tp=2)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=microbatches)
    stages = af.split(model_of(name, blocks))
    pipe = af.pipeline(
        stages, s, loss=af.losses.causal_lm, mesh=mesh, engine=engine, sharding=af.Sharding(**options)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 18, (microbatches, 7), generator=generator)
    batch: dict[str, Tensor] = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    return pipe, pipe.init(), batch


def kind_of(target: Any) -> str | None:
    """ "all_reduce" and so on for what tp ranks do, in either engine; "FSDP ..." for what `dp_shard` ranks do."""
    namespace, name, *_ = [*str(target).split("."), ""]
    if namespace == "c10d":
        return {"_allgather_base_": "FSDP gather", "_reduce_scatter_base_": "FSDP reduce"}.get(name)
    name = name.removesuffix("_tensor").removesuffix("_into")
    talks = namespace in ("autofunc", "_c10d_functional") and name in ("all_reduce", "all_gather", "reduce_scatter")
    return name if talks else None


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = kind_of(func)
        self.found.update([kind] if kind else [])
        return func(*args, **(kwargs or {}))


def of_run(name: str, blocks: int, microbatches: int, engine: str, options: dict[str, Any]) -> Counts:
    """Collectives of one step."""
    pipe, params, batch = pipe_of(name, blocks, microbatches, engine, options)
    af.value_and_grad(pipe)(params, batch)
    with Counting() as counting:
        af.value_and_grad(pipe)(params, batch)
    return dict(counting.found)


def of_program(name: str, blocks: int, options: dict[str, Any]) -> tuple[Counts, Counts, Counts]:
    """Collectives of the forward and of the backward of one microbatch; and sharding actions of a step."""
    pipe, params, batch = pipe_of(name, blocks, 2, "graph", options)
    plan = plan_of(pipe, params, batch)
    stage = plan.functions[0]
    order = list(stage.joint.graph.nodes)
    found = []
    for piece in (stage.pieces.forward, stage.pieces.backward):
        kinds = (kind_of(node.target) for node in in_order(piece, order))
        found.append(dict(Counter(kind for kind in kinds if kind)))
    actions = Counter(action.kind.name for action in plan.schedule[0] if action.kind >= Kind.UNSHARD)
    return found[0], found[1], dict(actions)


def more(larger: Counts, smaller: Counts) -> Counts:
    """What another block adds."""
    return {name: count - smaller.get(name, 0) for name, count in larger.items() if count != smaller.get(name, 0)}


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("gpt2", False),
        ("llama", True),
        pytest.param("gpt2", True, marks=pytest.mark.full),
        pytest.param("llama", False, marks=pytest.mark.full),
    ],
)
def test_collectives_of_a_block_in_the_program(workers: WorkerPool, name: str, sequence: bool) -> None:
    options = {"sequence_parallel": sequence}
    (forward, backward, actions), (forward_1, backward_1, _) = (
        workers.run(of_program, name, blocks, options)[0] for blocks in (2, 1)
    )
    expected = {"all_gather": 2, "reduce_scatter": 2} if sequence else {"all_reduce": 2}
    assert more(forward, forward_1) == expected
    assert more(backward, backward_1) == expected
    assert actions == {"UNSHARD": 1, "RESHARD": 1, "REDUCE_GRAD": 1}


@pytest.mark.parametrize(
    ("microbatches", "sequence", "engine"),
    [
        (2, False, "eager"),
        (2, True, "graph"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [(2, False, "graph"), (4, False, "graph"), (4, True, "eager"), (2, True, "eager")]
        ),
    ],
)
def test_collectives_of_a_block_in_a_run(workers: WorkerPool, microbatches: int, sequence: bool, engine: str) -> None:
    options = {"sequence_parallel": sequence}
    two, one = (workers.run(of_run, "gpt2", blocks, microbatches, engine, options)[0] for blocks in (2, 1))
    added = more(two, one)
    assert (added.pop("FSDP gather"), added.pop("FSDP reduce")) == (1, 1), "once a step"
    if sequence:
        assert added == dict.fromkeys(("all_gather", "reduce_scatter"), 4 * microbatches), "two pairs forward, two back"
    else:
        assert added == {"all_reduce": 4 * microbatches}, "two forward, two back"


@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.full)])
def test_one_gather_per_use(workers: WorkerPool, microbatches: int) -> None:
    options = {"reshard_after_forward": True}
    two, one = (workers.run(of_run, "gpt2", blocks, microbatches, "graph", options)[0] for blocks in (2, 1))
    added = more(two, one)
    assert added["FSDP gather"] == 2 * microbatches, "each forward and each backward"
    assert added["FSDP reduce"] == 1


# --- bytes --------------------------------------------------------------------------------------------------------


class ParameterBytes:
    """Parameters in memory after each computation."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def before(self, op: Any, *_: object) -> None:
        pass

    def after(self, op: Any, step: Any, registers: Any, sends: Any) -> None:
        if isinstance(op, (Forward, Backward, BackwardInput, BackwardWeight)):
            self.seen.append(step.parameters.num_bytes)


def resident(schedule: str, reshard: bool) -> tuple[list[int], list[int]]:
    """(measured, by arithmetic) after each computation, on pp=2, dp_shard=2."""
    mesh = mesh_of(pp=2, dp_shard=2)
    s = af.schedule.build(schedule, num_ranks=2, num_microbatches=4)
    model = model_of("llama", 3)
    stages = af.split(model, s.num_stages)
    sharding = af.Sharding(reshard_after_forward=reshard, prefetch=0)
    pipe = af.pipeline(stages, s, loss=af.losses.causal_lm, mesh=mesh, sharding=sharding)
    params = pipe.init()
    ids = torch.randint(0, 18, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    rank = mesh.get_local_rank("pp")
    watch, rows = ParameterBytes(), []

    def observe(plan: Any, program: Any, microbatches: Any) -> list[Any]:
        rows.append(plan.schedule[rank])
        return [watch]

    pipe.run(Mode.GRADS, params, batch, None, observe=observe)
    sizes = {
        stage.index: sum(4 * model.spec[path].numel() for path in stage.paths)
        for stage in stages
        if s.placement[stage.index] == rank
    }
    held = sum(sizes.values()) // 2  # every parameter has an even number of rows
    gathered: set[int] = set()
    expected = []
    for action in rows[0]:
        if action.kind is Kind.UNSHARD:
            gathered.add(action.stage)
        elif action.kind is Kind.RESHARD:
            gathered.remove(action.stage)
        elif action.kind <= Kind.W:
            expected.append(held + sum(sizes[stage] for stage in gathered))
    return watch.seen, expected


@pytest.mark.parametrize(
    ("schedule", "reshard"),
    [
        ("1f1b", False),
        ("zbv", True),
        pytest.param("1f1b", True, marks=pytest.mark.full),
        pytest.param("zbv", False, marks=pytest.mark.full),
    ],
)
def test_parameters_in_memory_are_a_shard_and_the_gathered_ones(workers: WorkerPool, schedule: str, reshard: bool) -> None:
    for measured, expected in workers.run(resident, schedule, reshard):
        assert measured == expected
        if reshard and schedule == "zbv":
            assert max(measured) < 1.5 * 2 * min(measured), "one stage at a time"


def order_of_waits(engine: str, compile: bool) -> list[int]:
    """Return the groups still in transit when each layer of the first forward begins."""
    mesh = mesh_of(dp_shard=4)
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    pending: list[int] = []

    def watched(layer: af.Layer) -> af.Layer:
        def apply(p: Any, x: Any, batch: Any) -> Any:
            pending.append(len(storages[0]._gathering) if storages else -1)
            return layer.apply(p, x, batch)

        return af.Layer(layer.init, apply)

    model = model_of("llama", 2)
    layers = {name: watched(layer) for name, layer in model.layers.items()} if engine == "eager" else model.layers
    pipe = af.pipeline(
        af.split(af.Model(layers)), s, loss=af.losses.causal_lm, mesh=mesh, engine=engine, compile=compile
    )  # fmt: skip
    params, storages = pipe.init(), []
    ids = torch.randint(0, 18, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    first, _ = af.value_and_grad(pipe)(params, batch)
    storages.append(next(reversed(pipe._parameters._storages._own.values())))
    pending.clear()
    arrive = storages[0].arrive

    def noted(groups: Any) -> None:
        if engine == "graph":
            pending.append(len(storages[0]._gathering))
        arrive(groups)

    storages[0].arrive = noted
    again, _ = af.value_and_grad(pipe)(params, batch)
    assert torch.equal(first, again)
    return pending


@pytest.mark.parametrize(
    ("engine", "compile"), [("graph", False), ("eager", False), pytest.param("graph", True, marks=pytest.mark.full)]
)
def test_a_forward_begins_while_later_layers_arrive(workers: WorkerPool, engine: str, compile: bool) -> None:
    for pending in workers.run(order_of_waits, engine, compile):
        expected = [4, 3, 2, 1, 0] if engine == "eager" else [5, 4, 3, 2, 1]
        assert pending[:5] == expected, "embedding, two blocks, norm, head: one after the other"
        assert not any(pending[5:])
