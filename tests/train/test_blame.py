"""Among several failed processes the cause is named, not its consequences."""

from __future__ import annotations

import json
import pickle
import re
import signal
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch._C._distributed_c10d as c10d

from autofunc.errors import PipelineRunError
from autofunc.train.blame import brief, report
from autofunc.train.device import on_gpus
from autofunc.train.flight_recorder import FlightRecorder, keep_record


def failure(pid: int, exitcode: int, raised: str | None = None, timestamp: int = 100) -> Any:
    message: Any = "To enable traceback see: a page of torch" if exitcode > 0 else "Signal received"
    if raised is not None:
        message = {"message": raised, "extraInfo": {"py_callstack": f"Traceback\n{raised}", "timestamp": timestamp}}
    return SimpleNamespace(pid=pid, exitcode=exitcode, message=message, timestamp=timestamp)


VALUE_ERROR = "ValueError: broken on purpose"
LOST = "autofunc.errors.PeerLostError: the other end of a transfer is gone or too late"
GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
IN_ACTION = f"autofunc.errors.PipelineRunError: rank 0, step 2, action 1F0: {GLOO}"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (failure(3, -signal.SIGTERM), "killed by SIGTERM"),
        (failure(3, -signal.SIGINT, timestamp=102), "killed by SIGINT"),
        (failure(3, -signal.SIGKILL), "killed by SIGKILL"),
        (failure(3, 1, VALUE_ERROR, timestamp=103), VALUE_ERROR),
        (failure(3, 137), r"exit code 137 .*memory.* without an exception, as after os._exit"),
        (failure(3, 5), "exit code 5 and without an exception"),
        (failure(3, 1, "it called sys.exit(3)"), r"it called sys.exit\(3\)"),
    ],
)
@pytest.mark.parametrize("others", [LOST, GLOO, IN_ACTION, None])
def test_the_cause_is_named(cause: Any, words: str, others: str | None) -> None:
    victims = [failure(pid, 1, others) if others else failure(pid, -signal.SIGTERM) for pid in (1, 2)]
    found = report({0: victims[0], 1: victims[1], 3: cause}, {2} if others else {1, 2})
    first, *rest = found.rsplit("\nrank 0 was", 1)
    assert first.startswith("rank 3 failed: ") and re.search(words, first)
    assert len(rest) == 1 and "pytorch.org" not in found and "a page of torch" not in found


ABORT = failure(9, -signal.SIGABRT, timestamp=90)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (failure(3, 1, VALUE_ERROR, timestamp=103), VALUE_ERROR),
        (failure(3, -signal.SIGKILL), "killed by SIGKILL"),
        (failure(3, 5), "exit code 5"),
    ],
)
def test_nccl_aborts_are_not_the_cause(cause: Any, words: str) -> None:
    """NCCL's watchdog aborts those that wait for the failed process, and they may be seen first."""
    found = report({0: ABORT, 1: cause, 2: failure(2, -signal.SIGTERM)}, {2}, ["before 0B0", "in 1F3", ""])
    assert found.startswith("rank 1 (in 1F3) failed: ") and words in found
    assert "rank 0 was ended, or failed after it" in found and "SIGABRT" not in found


def test_positions_of_all_ranks_after_an_nccl_timeout(tmp_path: Path) -> None:
    """No rank is certain to be the cause, so each is reported, with the message of NCCL's watchdog."""
    work = "WorkNCCL(SeqNum=7, OpType=SEND, NumelIn=4, NumelOut=4, Timeout(ms)=600000) ran for 600081 milliseconds"
    (tmp_path / "logs").mkdir()
    for rank in (0, 2):
        line = (
            f"[rank{rank}]:[E1118] [Rank {rank}] Watchdog caught collective operation timeout: {work}\nterminate called\n"
        )
        (tmp_path / "logs" / f"rank_{rank}.log").write_text("x" * 70_000 + "\n" + line)
    others = failure(1, -signal.SIGTERM), failure(2, -signal.SIGABRT, timestamp=95)
    found = report({0: ABORT, 1: others[0], 2: others[1]}, {1}, ["step 7, before 0B2", "step 7, in 1F3"], tmp_path)
    assert found.splitlines() == [
        "rank 0 (step 7, before 0B2) failed: aborted (SIGABRT): NCCL's watchdog does so after "
        "distributed.timeout_minutes, and C++ code that crashes",
        "rank 1 was ended, or failed as well (step 7, in 1F3)",
        "rank 2 was ended, or failed as well",
        f"NCCL waited too long: {work}",
        f"log: {tmp_path}/logs/rank_0.log",
    ]


def test_a_crash_comes_before_its_lost_peers() -> None:
    found = report({0: failure(1, 1, LOST, timestamp=80), 1: ABORT}, set())
    assert found.startswith("rank 1 failed: aborted (SIGABRT)")


def test_the_failing_position_is_named() -> None:
    found = report({1: failure(1, -signal.SIGKILL)}, set(), ["step 7, before 0B2", "step 7, in 1F3"])
    assert found == "rank 1 (step 7, in 1F3) failed: killed by SIGKILL"
    assert report({1: failure(1, -signal.SIGKILL)}, set(), ["", ""]) == "rank 1 failed: killed by SIGKILL"


def test_the_log_is_named() -> None:
    failures = {0: failure(2, 1, GLOO), 1: failure(1, -signal.SIGKILL)}
    assert report(failures, {2}, (), Path("out")).splitlines() == [
        "rank 1 failed: killed by SIGKILL",
        "rank 0 was ended, or failed after it",
        "log: out/logs/rank_1.log",
    ]
    hang = failure(1, 1, "autofunc.errors.HangError: no progress")
    assert report({0: hang}, set(), (), Path("out")) == "no progress\nlog: out/logs/rank_0.log"


def test_a_hang_covers_all_ranks() -> None:
    said = "no progress for 61 s\n  rank 0: step 7, waits for rank 1"
    found = report({0: failure(1, 1, f"autofunc.errors.HangError: {said}"), 1: failure(2, -signal.SIGTERM)}, {2})
    assert found == said


def test_a_rank_that_raised_and_was_then_ended() -> None:
    """It recorded its error, hung while it exited, and its victim was seen first."""
    found = report({0: failure(1, 1, LOST), 1: failure(2, -signal.SIGKILL, VALUE_ERROR, timestamp=130)}, {2})
    assert found.startswith("rank 1 failed: ") and VALUE_ERROR in found


def test_brief() -> None:
    """The user's lines and the last message, of any chain; other text is shown unchanged."""

    def raise_in_chain() -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise PipelineRunError("rank 1, step 2, action 1F0: bad\nrank 0 | 0F0") from error

    with pytest.raises(PipelineRunError) as caught:
        raise_in_chain()
    said = brief("".join(traceback.format_exception(caught.value)))
    assert said.startswith("in your code") and 'json.loads("{")' in said and "/json/decoder.py" not in said
    assert said.count("\n") == 4 and said.endswith("action 1F0: bad\nrank 0 | 0F0\n(the whole traceback: AUTOFUNC_DEBUG=1)")
    assert brief("ValueError: odd").startswith("ValueError: odd")


def test_the_whole_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOFUNC_DEBUG", "1")
    assert f"Traceback\n{VALUE_ERROR}" in report({0: failure(1, 1, VALUE_ERROR)}, set())


def test_nccls_flight_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
    older = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    for name in (*names, *older):
        monkeypatch.delenv(name, raising=False)
    recorder, logs = FlightRecorder(tmp_path), tmp_path / "logs"
    prefix = f"{logs}/nccl_trace_rank_"
    assert recorder.variables() == dict(zip(names, ("2000", "1", prefix), strict=True))
    assert recorder.dumps(0.0) == [], "nothing is there"
    logs.mkdir()
    for number in (1, 0):
        Path(f"{prefix}{number}").touch()
    (logs / "rank_0.log").touch()
    (line,) = recorder.dumps(0.0)
    assert f"{logs}: nccl_trace_rank_0, nccl_trace_rank_1 (torchfrtrace -p nccl_trace_rank_ {logs})" in line
    assert recorder.dumps(time.time() + 60) == [], "those of a run before"

    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(tmp_path / "mine"))
    assert recorder.variables() == {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    (tmp_path / "mine3").touch()
    assert "mine3" in recorder.dumps(0.0)[0]


def test_a_hang_dumps_the_flight_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our watchdog comes before torch's own timeout, which would write the same files."""
    recorder = FlightRecorder(tmp_path)
    for name, value in recorder.variables().items():
        monkeypatch.setenv(name, value)
    keep_record()
    assert recorder.dumps(0.0) == [], "this build has no NCCL"
    monkeypatch.setattr(c10d, "_dump_nccl_trace", c10d._dump_fr_trace, raising=False)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    keep_record()
    assert pickle.loads((tmp_path / "logs" / "nccl_trace_rank_3").read_bytes())["entries"] == []
    assert "nccl_trace_rank_3" in recorder.dumps(0.0)[0]

    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "logs" / "nccl_trace_rank_3" / "below"))
    keep_record()  # cannot be written, and ends nothing
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "off"))
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")
    keep_record()
    assert not (tmp_path / "off3").exists()


def test_the_flight_recorder_is_on_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, wanted, is_on in (
        (0, None, False),
        (0, "cuda", True),
        (2, None, True),
        (2, "cuda", True),
        (2, "cpu", False),
    ):
        monkeypatch.setattr("torch.cuda.device_count", lambda found=found: found)
        assert on_gpus(wanted) == is_on  # type: ignore[arg-type]
