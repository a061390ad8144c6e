"""Forked workers: their environment, how their ends are reported, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from autofunc.errors import PipelineRunError
from autofunc.train.flight_recorder import FlightRecorder
from autofunc.train.fork_server import ForkServer, is_alone
from autofunc.train.launch import launch
from tests.train.forked import end, note

ROOT = Path(__file__).parents[2]
BY_ITSELF = """
import sys, time
from pathlib import Path
from functools import partial
from autofunc.train.fork_server import ForkServer
from tests.train.forked import note_and_sleep
make = ForkServer.forked if sys.argv[1] == "forked" else ForkServer.started
server = make(["random"])
server.fork(partial(note_and_sleep, Path("pids")), [{"RANK": "0"}, {"RANK": "1"}], Path("folder"))
time.sleep(60)
"""
FORKED = """
import atexit, sys
from functools import partial
from pathlib import Path
from autofunc.train.fork_server import ForkServer, is_alone
sys.stdout.write("once ")
assert is_alone()
with ForkServer.forked(["random"]) as server:
    atexit.register(sys.stdout.write, " and at the end")
    work = partial(exec, "from tests.train.forked import leave_open; leave_open()")
    server.fork(work, [{"RANK": "0"}, {"RANK": "1"}], Path("folder"))
    codes = [each.exitcode for _ in range(2) for each in server.ended(30)]
    print(codes, end="")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OF_ALL", "1")
        with ForkServer.started(["random"]) as started:
            yield started


def ended(server: ForkServer, hows: list[str]) -> dict[int, int]:
    """Return the exit codes by rank of workers that end on their own."""
    pids = server.fork(partial(end, hows), [{"RANK": str(rank)} for rank in range(len(hows))], Path("nowhere"))
    found: dict[int, int] = {}
    until = time.monotonic() + 30
    while len(found) < sum(how != "sleep" for how in hows) and time.monotonic() < until:
        found |= {pids.index(each.pid): each.exitcode for each in server.ended(0.2)}
    return found


def test_exit_codes_are_reported(server: ForkServer) -> None:
    hows = ["", "SIGKILL", "sleep", "leave", "SIGINT"]
    assert ended(server, hows) == {0: 0, 1: -9, 3: 7, 4: -2}
    (asleep,) = server.signal(signal.SIGTERM)
    assert [(each.pid, each.exitcode) for each in server.ended(30)] == [(asleep, -signal.SIGTERM)]
    assert not server.signal(signal.SIGTERM)


def test_workers_environments(server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, handlers = dict(os.environ), [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    launch(server, 2, partial(note, tmp_path), recorder=FlightRecorder(tmp_path))
    first, second = (dict(line.split("=", 1) for line in (tmp_path / rank).read_text().splitlines()) for rank in "01")
    for found, rank in ((first, "0"), (second, "1")):
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["OF_ALL"]) == (rank, rank, "2", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and first["AUTOFUNC_CHECKED"] == "1"
    assert first["TORCH_FR_DUMP_TEMP_FILE"] == second["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/logs/nccl_trace_rank_"
    assert first["DRAWN"].split()[0] != second["DRAWN"].split()[0], "Python's generator"
    assert first["DRAWN"].split()[1] != second["DRAWN"].split()[1], "numpy's"
    assert dict(os.environ) == before
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize(("how", "words"), [("leave", "exit code 7"), ("SIGSEGV", "killed by SIGSEGV")])
def test_a_failing_worker_ends_the_others(server: ForkServer, how: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(PipelineRunError, match=f"^rank 1 failed: .*{words}.*\nrank 0 was ended, or failed after it$"):
        launch(server, 2, partial(end, ["sleep", how]))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_launcher_that_is_told_to_end(server: ForkServer, number: signal.Signals) -> None:
    parent = os.getpid()

    def tell() -> None:
        time.sleep(0.5)
        os.kill(parent, number)

    threading.Thread(target=tell).start()
    with pytest.raises(SystemExit) as stopped:
        launch(server, 2, partial(end, ["sleep", "sleep"]))
    assert stopped.value.code == 128 + number
    assert not server.signal(signal.SIGTERM), "none is left"


def test_a_dead_server() -> None:
    with ForkServer.started([]) as server:
        os.kill(server._pid, signal.SIGKILL)
        with pytest.raises(PipelineRunError, match="the fork server was killed by SIGKILL"):
            launch(server, 2, partial(end, ["", ""]))


@pytest.mark.parametrize("how", ["forked", "started"])
def test_a_dead_launcher_leaves_nothing(tmp_path: Path, how: str) -> None:
    (tmp_path / "pids").mkdir()
    (tmp_path / "folder").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", BY_ITSELF, how], cwd=tmp_path, env=environment)
    until = time.monotonic() + 60
    while len(pids := list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(pids) == 2
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid.name}").exists() for pid in pids) or (tmp_path / "folder").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_fork_does_none_of_the_launchers_work(tmp_path: Path) -> None:
    """Workers end as Python does: open files are flushed."""
    (tmp_path / "left").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = subprocess.run(
        [sys.executable, "-c", FORKED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (launcher.returncode, launcher.stdout, launcher.stderr) == (0, "once [0, 0] and at the end", "")
    assert {file.name: file.read_text() for file in (tmp_path / "left").iterdir()} == {"0": "written", "1": "written"}


def test_waits_for_threads() -> None:
    ends = threading.Event()
    other = threading.Thread(target=ends.wait)
    other.start()
    assert not is_alone(0.0)
    ends.set()
    other.join()
    assert is_alone() == (threading.active_count() == 1)
