"""Overlapped pairs are interleaved if ranks exchange values; the bits do not change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import autofunc as af
from autofunc.errors import PipelineRunError, ScheduleError
from autofunc.mesh import data_coordinate
from autofunc.runtime.executor import TurnObserver
from autofunc.runtime.ops import Op
from autofunc.runtime.plan import Mode
from autofunc.schedule import Kind
from autofunc.shard.expert_exchange import GroupPeers
from stages.llama import build_llama_model
from stages.moe import build_moe_model, moe_causal_lm
from tests.cases import assert_same_tree, cut_evenly, mesh_of, plan_of
from tests.pool import WorkerPool
from tests.shard.spread_models import model_of

Case = tuple[af.Pipeline, dict[str, Tensor]]


def pipe_of(what: str, **options: Any) -> Case:
    """`dualpipe_v` over two ranks: experts spread over two dp or cp ranks, or functions or a captured module over tp=2."""
    s = af.schedule.build("dualpipe_v", num_ranks=2, num_microbatches=6)
    ids = torch.randint(0, 16, (24, 9 if what == "experts over cp" else 7), generator=torch.Generator().manual_seed(0))
    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "vocab_size": 32}
    loss: Any = af.losses.causal_lm
    if what.startswith("experts"):
        model = build_moe_model(
            **sizes, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
            num_experts_per_tok=2, initializer_range=0.3,
        )  # fmt: skip
        loss, sharding = partial(moe_causal_lm, router_aux_loss_coef=0.1), af.Sharding(expert_parallel=2)
        mesh = mesh_of(pp=2, cp=2) if what == "experts over cp" else mesh_of(pp=2, dp_shard=2)
        place, places = data_coordinate(mesh)
        ids = ids.chunk(places)[place]
    else:
        mesh, sharding = mesh_of(pp=2, tp=2), af.Sharding(sequence_parallel=what == "sequence")
        model = build_llama_model(**sizes, intermediate_size=24, num_attention_heads=4)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    stages = af.split(model, ["layers.1", "layers.2", "layers.3"])
    if what == "captured":
        model, loss = af.from_module(model_of("llama", num_hidden_layers=4), batch), None
        stages = af.split(model, 4)
    return af.pipeline(stages, s, loss=loss, mesh=mesh, sharding=sharding, **options), batch


def both_ways(what: str, options: dict[str, Any]) -> None:
    found = []
    for overlap in (False, True):
        pipe, batch = pipe_of(what, overlap_f_b=overlap, **options)
        params = pipe.init(seed=1)
        for _ in range(2):  # the first call looks at how values lie
            loss, grads = af.value_and_grad(pipe)(params, batch)
            found.append((loss, pipe.gather(grads)))
        assert len(plan_of(pipe, params, batch).pairs) == (2 if overlap else 0)
    loss, grads = found[0]
    for other_loss, other_grads in found[1:]:
        assert torch.equal(loss, other_loss)
        assert_same_tree(grads, other_grads)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("experts", {}),
        ("functions", {}),
        ("captured", {}),
        pytest.param("experts", {"remat": "stage"}, marks=pytest.mark.full),
        pytest.param("experts over cp", {}, marks=pytest.mark.full),
        pytest.param("sequence", {}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_interleaving_does_not_change_bits(workers: WorkerPool, what: str, options: dict[str, Any]) -> None:
    workers.run(both_ways, what, options)


# --- what happens when


class Log(TurnObserver):
    """Turns, operators and exchanges, one after the other."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.side = ""

    def __call__(self, *_: Any) -> list[Log]:
        return [self]

    def before(self, *_: Any) -> None:
        pass

    def after(self, op: Op, *_: Any) -> None:
        self.events.append("end")
        self.side = ""

    def turn(self, op: Op, waits: bool) -> None:
        """Only when it changes."""
        if (name := type(op).__name__) != self.side:
            self.events.append(name)
        self.side = name

    def logged(self, begin: Callable[..., Callable[[], Tensor]]) -> Callable[..., Callable[[], Tensor]]:
        def logged(*given: Any) -> Callable[[], Tensor]:
            self.events.append("begin")
            wait = begin(*given)

            def waited() -> Tensor:
                self.events.append("wait")
                return wait()

            return waited

        return logged


class Operators(TorchDispatchMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.events.append("operator")
        return function(*args, **kwargs or {})


def logged_events() -> list[str]:
    pipe, batch = pipe_of("experts")
    params, log = pipe.init(seed=1), Log()
    af.value_and_grad(pipe)(params, batch)
    state = pipe._state_beside(params)
    with pytest.MonkeyPatch.context() as patch, Operators(log):
        for name in ("all_gather", "all_reduce", "all_to_all"):
            patch.setattr(GroupPeers, name, log.logged(getattr(GroupPeers, name)))
        pipe.run(Mode.GRADS, params, batch, None, state, log)
    return log.events


def test_one_computes_while_the_exchange_of_the_other_is_under_way(workers: WorkerPool) -> None:
    """A stage has one layer: four exchanges forward (counts, rows there and back, the router's mean), three backward."""
    logs = workers.run(logged_events)
    begins = [[event for event in log if event != "operator"] for log in logs]
    assert begins[0] == begins[1] and begins[2] == begins[3], "ranks that share experts do the same"
    log, pairs = logs[0], []
    for event in log:
        if event in ("Forward", "Backward") and (not pairs or pairs[-1][-1] == "end"):
            pairs.append([event])
        elif pairs and pairs[-1][-1] != "end":
            pairs[-1].append(event)
    marked = [action.peer == -2 for action in pipe_row()]
    assert len(pairs) == sum(marked) > 0
    for pair in pairs:
        turns = " ".join(event for event in pair if event != "operator").replace("Forward", "F").replace("Backward", "B")
        assert turns == (
            "F begin B begin F wait begin B wait begin F wait begin B wait begin F wait begin B wait F wait end"
        )
        computed = [0]
        for event in pair:
            computed = [*computed, 0] if event in ("Forward", "Backward") else computed
            computed[-1] += event == "operator"
        assert all(computed[2:-1]), "every turn computes"


def pipe_row() -> list[Any]:
    return list(af.schedule.build("dualpipe_v", num_ranks=2, num_microbatches=6)[0])


# --- who looks on


def measured() -> tuple[Any, bool]:
    pipe, batch = pipe_of("functions")
    params = pipe.init(seed=1)
    memory, weighed = pipe.memory(params, batch), pipe.measure_bytes(params, batch)
    said = af.schedule.live_bytes(plan_of(pipe, params, batch).schedule, memory)
    same = all(found == expected.tolist() for found, expected in zip(weighed, said, strict=True))
    return pipe.profile(params, batch, steps=1), same


def test_profiles_show_turns_and_bytes_match_the_simulator(workers: WorkerPool) -> None:
    timeline, bytes_as_said = workers.run(measured)[0]
    assert bytes_as_said
    for rank, turns in enumerate(timeline.turns):
        row, start, end = list(timeline.schedule[rank]), timeline.start[rank], timeline.end[rank]
        pairs = [place for place, action in enumerate(row) if action.peer == -2]
        assert {turn.position for turn in turns} == {*pairs, *(place + 1 for place in pairs)}
        assert any(turn.waits for turn in turns)
        for place in pairs:
            spent = {at: sum(t.end - t.start for t in turns if t.position == at) for at in (place, place + 1)}
            assert end[place] == start[place + 1]
            assert end[place] - start[place] == pytest.approx(spent[place])
            taken = [turn for turn in turns if turn.position in (place, place + 1)]
            assert start[place] <= taken[0].start and taken[-1].end <= end[place + 1]
            assert (start[place + 2 :] >= end[place + 1]).all()
            assert [turn.end for turn in taken[:-1]] == [turn.start for turn in taken[1:]], "turns leave no gap"
        assert (start[1:] >= start[:-1]).all()


# --- where nothing overlaps


def pairs_of(options: dict[str, Any]) -> tuple[int, bool]:
    pipe, batch = pipe_of("experts", **options)
    plan = plan_of(pipe, pipe.init(seed=1), batch)
    return len(plan.pairs), any(action.peer == -2 for row in plan.schedule for action in row)


def test_the_eager_engine_does_not_interleave(workers: WorkerPool) -> None:
    assert workers.run(pairs_of, {"engine": "eager"}) == [(0, False)] * 4


def test_stages_that_exchange_nothing_are_not_interleaved() -> None:
    s = af.schedule.build("dualpipe_v", num_ranks=2, num_microbatches=6)
    model = build_llama_model(
        hidden_size=8, intermediate_size=12, num_hidden_layers=4, num_attention_heads=2, vocab_size=16
    )
    pipe = af.pipeline(cut_evenly(model, 4), s, loss=af.losses.causal_lm)
    ids = torch.zeros(6, 5, dtype=torch.int64)
    plan = plan_of(pipe, pipe.init(), {"input_ids": ids, "labels": ids})
    assert not plan.pairs
    assert plan.schedule == af.schedule.lower(s), "the program is what it is without pairs"


def of_a_pair_that_waits_for_itself(overlap: bool) -> list[str]:
    """A pair whose backward needs what the other rank makes of its forward, which is sent after both."""
    s = af.schedule.from_text("0F0 (0F1;0B0)OVERLAP_F_B 0B1\n1F0 1F1 1B0 1B1")
    model = build_llama_model(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=16
    )
    stages, mesh = af.split(model, ["layers.1"]), mesh_of(pp=2, tp=2)
    pipe = af.pipeline(stages, s, loss=af.losses.causal_lm, mesh=mesh, overlap_f_b=overlap)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    try:
        pipe.build({"input_ids": ids, "labels": ids})
    except ScheduleError as error:
        return [str(error), *error.__notes__]
    return []


def test_a_pair_that_waits_for_itself_is_refused(workers: WorkerPool) -> None:
    for message, note, *_ in workers.run(of_a_pair_that_waits_for_itself, True):
        assert "0F1" in message or "0B0" in message
        assert "overlap_f_b=False runs them one after the other" in note
    assert workers.run(of_a_pair_that_waits_for_itself, False) == [[]] * 4


def fails_in_a_pair() -> str:
    pipe, batch = pipe_of("experts")
    params = pipe.init(seed=1)
    af.value_and_grad(pipe)(params, batch)
    log, found = Log(), ""

    def turn(op: Op, waits: bool) -> None:
        if type(op).__name__ == "Backward":
            raise MemoryError("no room")

    log.turn = turn  # type: ignore[method-assign]
    try:
        pipe.run(Mode.GRADS, params, batch, None, pipe._state_beside(params), log)
    except PipelineRunError as error:
        found = str(error.action)
    return found


def test_an_error_names_the_action_of_its_turn(workers: WorkerPool) -> None:
    found = workers.run(fails_in_a_pair)
    assert {Kind[action.lstrip("0123")[0]] for action in found} == {Kind.B}
