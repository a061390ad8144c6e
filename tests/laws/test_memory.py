"""The law of memory: bytes alive in a run are those the schedule predicts, and no slot is wasted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import autofunc as af
from autofunc.errors import AutofuncError
from autofunc.runtime.program import Program
from autofunc.schedule import Kind, Schedule, StageBytes
from tests.cases import make_case, plan_of, pp_mesh
from tests.pool import WorkerPool

SCHEDULES = af.schedule.names()


def pipe_of(model_name: str, name: str, num_ranks: int, num_microbatches: int, mesh: Any = None) -> tuple[Any, Any, Any]:
    s = af.schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    _, stages, loss, batch = make_case(model_name, s.num_stages, 2 * num_microbatches)
    pipe = af.pipeline(stages, s, loss=loss, mesh=mesh)
    return pipe, pipe.init(seed=3), batch


def check_bytes(pipe: Any, params: Any, batch: Any, key: Any) -> None:
    """Check that measured bytes equal simulated ones on every rank, after every action."""
    memory = pipe.memory(params, batch, key)
    measured = pipe.measure_bytes(params, batch, key)
    simulated = af.schedule.live_bytes(pipe.schedule, memory)
    for rank, (found, expected) in enumerate(zip(measured, simulated, strict=True)):
        assert found == expected.tolist(), f"rank {rank}"
        assert max(found) > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_measured_bytes_equal_the_simulators(name: str) -> None:
    """On tensors of one size for each model; on tokens, of all sizes."""
    check_bytes(*pipe_of("gpt2", name, 3, 7), (3, 5))
    check_bytes(*pipe_of("mlp", name, 2, 4), None)


@pytest.mark.full
@pytest.mark.parametrize("name", SCHEDULES)
def test_measured_bytes_equal_the_simulators_in_other_sizes(name: str) -> None:
    check_bytes(*pipe_of("mlp", name, 3, 7), (3, 5))
    check_bytes(*pipe_of("mlp", name, 4, 8), None)
    for num_ranks, num_microbatches in ((2, 4), (3, 7), (4, 8)):
        check_bytes(*pipe_of("gpt2", name, num_ranks, num_microbatches), None)


def measure_on_gloo(name: str, num_ranks: int) -> None:
    check_bytes(*pipe_of("gpt2", name, num_ranks, 8, pp_mesh(num_ranks)), (3, 5))


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [
        ("zb_h1", 4),
        ("zbv", 4),
        pytest.param("1f1b", 4, marks=pytest.mark.full),
        pytest.param("interleaved_1f1b", 2, marks=pytest.mark.full),
    ],
)
def test_measured_bytes_equal_the_simulators_on_gloo(workers: WorkerPool, name: str, num_ranks: int) -> None:
    workers.run(measure_on_gloo, name, num_ranks)


def test_the_eager_engine_cannot_predict_memory() -> None:
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    model, stages, loss, batch = make_case("mlp", 2, 4)
    pipe = af.pipeline(stages, s, loss=loss, engine="eager")
    with pytest.raises(AutofuncError, match='use engine="graph"'):
        pipe.memory(model.init(), batch)


# --- receive slots ------------------------------------------------------------------------------------------------


def overlap(schedule: Schedule, rank: int, keeps: dict[int, StageBytes]) -> int:
    """Count, action by action, the most received values in use at once. Every boundary has one value of one shape."""
    row = list(schedule[rank])
    last: dict[tuple[bool, int, int], int] = {}  # (flows forward, stage, microbatch) -> where it is read last
    for position, action in enumerate(row):
        kept = keeps[action.stage]
        if action.kind in (Kind.B, Kind.I):
            last[False, action.stage, action.microbatch] = position
        if action.kind is Kind.W and kept.weight_cotangents:
            last[False, action.stage, action.microbatch] = position
        reads_activation = (
            action.kind is Kind.F
            or (action.kind in (Kind.B, Kind.I) and (kept.kept_inputs or kept.weight_inputs))
            or (action.kind is Kind.W and kept.weight_inputs)
        )
        if reads_activation:
            last[True, action.stage, action.microbatch] = position
    busy: Counter[int] = Counter()
    for position, action in enumerate(row):
        if action.kind.is_receive:
            end = last[action.kind is Kind.RECV_F, action.stage, action.microbatch]
            busy.update(range(position, end + 1))
    return max(busy.values(), default=0)


FEW = ["1f1b", "zb_h1", "zbv"]


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(name, marks=pytest.mark.full) for name in SCHEDULES if name not in FEW)]
)
def test_slots_are_as_many_as_received_values_in_use(name: str) -> None:
    """What captured stages say they keep; of all schedules on tokens."""
    for num_ranks, num_microbatches in ((2, 8), (4, 8)):
        pipe, params, batch = pipe_of("gpt2", name, num_ranks, num_microbatches)
        plan = plan_of(pipe, params, batch)
        keeps = {index: stage.bytes for index, stage in plan.functions.items()}
        for rank, program in plan.programs.items():
            assert one_per_layout(program) == overlap(program.schedule, rank, keeps)


def one_per_layout(program: Program) -> int:
    """Return the number of slots if all received values have one layout."""
    assert len(set(program.slots)) <= 1
    return len(program.slots)


# --- sends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_microbatches", [8, 24])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sends_are_released_by_what_the_schedule_proves(num_ranks: int, num_microbatches: int) -> None:
    """In 1F1B a rank holds as many sent values as it has microbatches in flight, however many there are in all."""
    lowered = af.schedule.lower(af.schedule.build("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches))
    for rank, settled in enumerate(af.schedule.settled_sends(lowered)):
        held: set[int] = set()
        most = 0
        for position, action in enumerate(lowered[rank]):
            complete = settled.get(position, [])
            assert held.issuperset(complete), "each send is settled once, after it was posted"
            held -= set(complete)
            held |= {position} if action.kind.is_send else set()
            most = max(most, len(held))
        assert most <= 2 * (num_ranks - rank) + 2
