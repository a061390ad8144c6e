"""A run without progress reports who waits for whom: ranks that wait, compute, or do not answer."""

from __future__ import annotations

import inspect
import queue
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import autofunc as af
from autofunc.errors import AutofuncError, HangError
from autofunc.runtime import agree, position, socket_ports, transport, watchdog
from autofunc.runtime.hang import Frame, State, describe, frames_of, late
from autofunc.runtime.position import here
from autofunc.shard import data_sum, expert_exchange, links, unix_sockets
from tests.cases import make_case, pp_mesh
from tests.pool import WorkerPool

TORCH = str(Path(torch.__file__).parent / "distributed" / "distributed_c10d.py")
USER = Frame("/home/me/net.py", 12, "forward", "time.sleep(1000)")
TRAIN = Frame("/home/me/train.py", 3, "<module>", "step(params, batch)")
ALL_REDUCE = Frame(TORCH, 3000, "all_reduce", "work.wait()")


@pytest.mark.parametrize("through", [(), (unix_sockets,), (queue, threading)], ids=["itself", "socket", "thread"])
@pytest.mark.parametrize("module", [expert_exchange, data_sum, links, socket_ports])
def test_a_rank_in_an_exchange_of_a_stage_waits_for_others(module: Any, through: tuple[Any, ...]) -> None:
    states = {0: state(*map(own, (module, *through))), 1: state(USER, *map(own, through))}
    assert late(states) == [1] and states[0].waits_for


def own(module: Any) -> Frame:
    return Frame(str(Path(module.__file__)), 198, "arrived", "work.wait()")


def state(*stack: Frame, action: str = "in 1F3", awaited: tuple[int, ...] = ()) -> State:
    return State("step 7", action, awaited, 61.0, 60.0, (TRAIN, *stack))


def test_a_waiting_rank_is_not_late() -> None:
    said = describe({0: state(own(transport), action="before 0B0", awaited=(1,)), 1: state(USER)})
    assert "rank 0: step 7, before 0B0, waits for rank 1 for 61 s" in said
    assert f"rank 1: step 7, in 1F3 for 61 s; {USER}" in said
    assert "rank 1 is late" in said and said.endswith(f"  {TRAIN}\n  {USER}")


def test_alone_in_a_collective() -> None:
    states = {0: state(own(transport), awaited=(1,)), 1: state(USER, ALL_REDUCE), 2: state(own(transport))}
    assert late(states) == [1]
    said = describe(states)
    assert f"rank 1: step 7, in 1F3, in all_reduce for 61 s; {USER}" in said
    assert "rank 2: step 7, in 1F3, waits for a transfer" in said and "rank 1 waits for others" in said


def test_different_collectives() -> None:
    other = Frame(TORCH, 5000, "barrier", "work.wait()")
    states = {0: state(USER, ALL_REDUCE), 1: state(USER, other)}
    assert late(states) == [0, 1] and "in barrier" in describe(states)


def test_all_wait_for_each_other() -> None:
    states = {rank: state(own(transport), awaited=(1 - rank,)) for rank in (0, 1)}
    assert late(states) == [] and "all wait for each other" in describe(states)


def test_another_kind_of_step() -> None:
    said = describe({0: state(own(agree)), 1: state(own(transport), awaited=(0,))})
    assert "rank 0: step 7, in 1F3, waits for other ranks to prepare the same step" in said


def test_a_process_that_does_not_answer() -> None:
    said = describe({0: state(own(transport), awaited=(1,)), 1: None}, ["step 7", "step 7, in 1F3"])
    assert "rank 1: does not answer: its process is stopped or gone, or holds Python's GIL" in said
    assert "last seen at: step 7, in 1F3" in said and late({0: state(own(transport)), 1: None}) == [1]


def test_many_ranks_that_do_the_same_share_a_line() -> None:
    said = describe({**{rank: state(own(transport)) for rank in range(1000) if rank != 5}, 5: state(USER)})
    assert "ranks 0-4, 6-999: " in said and said.count("\n") < 8


def test_a_process_in_a_debugger_does_not_hang() -> None:
    assert state(USER, Frame("/usr/lib/python3.11/bdb.py", 115, "dispatch_line", "")).is_looked_into
    assert not state(USER).is_looked_into


def test_frames_of_a_thread() -> None:
    frames = frames_of(inspect.currentframe())
    assert frames[-1].name == "test_frames_of_a_thread" and "frames_of(" in frames[-1].code


def test_positions_are_written_for_others_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = position.Position()
    monkeypatch.setattr("autofunc.pipe.here", here)
    monkeypatch.setattr("autofunc.runtime.step.here", here)
    position.make_file(tmp_path / "positions", 3)
    _, stages, loss, batch = make_case("mlp", 1, 8)
    seen: list[str] = []

    def noting(outputs: Any, microbatch: Any) -> Any:
        seen.append(position.read_file(tmp_path / "positions")[1])
        return loss(outputs, microbatch)

    pipe = af.pipeline(
        stages, af.schedule.build("1f1b", num_ranks=1, num_microbatches=2), loss=noting, engine="eager"
    )  # fmt: skip
    params = pipe.init()
    af.value_and_grad(pipe)(params, batch)
    assert set(seen) == {""}, "nothing is noted until somebody wants to know"
    here.is_on, seen[:] = True, []
    here.publish(tmp_path / "positions", 1)
    af.value_and_grad(pipe)(params, batch)
    assert seen == ["step 2, in 0F0", "step 2, in 0F1"]
    assert position.read_file(tmp_path / "positions") == ["", "after step 2", ""]


def test_timeouts_are_checked() -> None:
    with pytest.raises(AutofuncError, match="a timeout of 0 seconds"), af.watchdog(step_timeout_seconds=0):
        raise AssertionError("it does not begin")
    with af.watchdog(), pytest.raises(AutofuncError, match="inside another"), af.watchdog():
        raise AssertionError("it does not begin")


def hang(where: str) -> list[str]:
    """Return a rank's watchdog report if rank 1 sleeps in a layer, or alone calls a collective."""
    mesh, said, alarms = pp_mesh(2), [], []
    watchdog.leave = lambda: None  # this process lives on
    rank = mesh.get_local_rank("pp")
    _, stages, loss, batch = make_case("mlp", 2, 4)
    asleep = [False]

    def late_loss(outputs: Any, microbatch: Any) -> Any:
        if rank == 1 and asleep[0]:
            asleep[0] = False
            if where == "sleep":
                time.sleep(3)
            else:
                dist.all_reduce(torch.zeros(1))
        return loss(outputs, microbatch)

    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=late_loss, mesh=mesh, engine="eager")
    params = pipe.init()
    with af.watchdog(
        step_timeout_seconds=1, on_hang=lambda error: said.append(f"{type(error).__name__}: {error}"),
        on_alarm=lambda: alarms.append(True),
    ):  # fmt: skip
        af.value_and_grad(pipe)(params, batch)
        asleep[0] = True
        if where == "collective" and rank == 0:  # it comes to help in the end, so that this test ends
            threading.Timer(3.5, lambda: dist.all_reduce(torch.zeros(1))).start()
        af.value_and_grad(pipe)(params, batch)
        dist.barrier()
    assert alarms, "every process hears of it"
    return said


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("sleep", "rank 1 is late"),
        pytest.param("collective", "rank 1 waits for others that do not make the same call", marks=pytest.mark.full),
    ],
)
def test_one_process_reports_for_all(workers: WorkerPool, where: str, words: str) -> None:
    said = [text for each in workers.run(hang, where) for text in each]
    assert len(said) == 1 and said[0].startswith(f"{HangError.__name__}: no progress for "), said
    assert words in said[0] and "in late_loss" in said[0], said
    assert "rank 0: step 2, before 0B0, waits for rank 1" in said[0], said


def test_a_second_run_in_a_process_has_time_for_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the steps of the previous run were."""
    monkeypatch.setattr(here, "is_settled", True)
    monkeypatch.setattr(here, "slowest_step_seconds", 0.1)
    with af.watchdog():
        assert not here.is_settled and here.slowest_step_seconds == 0.0
