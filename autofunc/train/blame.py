"""Find the cause among several failed processes, and describe it."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from autofunc.errors import HangError, PeerLostError
from autofunc.installed import is_installed
from autofunc.train.logs import log_of
from autofunc.users_lines import HEADING, HINT, line_of_user, wants_whole

_LOST = re.compile(
    rf"{PeerLostError.__name__}|gloo/transport|Connection (closed|reset) by peer|ProcessGroupNCCL|DistBackendError"
)
"""Matches errors that only report another process's end: ours, and those of torch's collectives."""
_TOO_LATE = re.compile(r"Watchdog caught collective operation timeout: (.+)")
"""Matches the message of NCCL's watchdog before it aborts a process (torch 2.13, `ProcessGroupNCCL.cpp`)."""
_LOG_BYTES = 2**16  # of the end of a log to search
_HANG = re.compile(rf"autofunc\.errors\.{HangError.__name__}: ")


_FOLLOWED = 2
"""The distance from the cause (see `_distance`) from which a failure may be a consequence of another."""


def report(failures: Mapping[int, Any], ended: Set[int], positions: Sequence[str] = (), logs_in: Path | None = None) -> str:
    """Describe the cause, and the failures that followed.

    Args:
        failures: by rank, in the form of torch's launcher.
        ended: ids of processes that the launcher ended after the first failure.
        positions: by rank, the last action of each.
        logs_in: the run's folder, with one log per rank; the report names the log of the cause.
    """
    first_rank, first = min(failures.items(), key=lambda item: (_distance(item[1], ended), item[1].timestamp, item[0]))
    raised = _recorded(first) or ""
    log = [] if logs_in is None else [f"log: {log_of(logs_in, first_rank)}"]
    if _HANG.search(raised):  # covers all ranks; the remaining ones were ended after it
        return "\n".join([_HANG.split(raised)[-1].strip(), *log])
    at = f" ({positions[first_rank]})" if first_rank < len(positions) and positions[first_rank] else ""
    lines = [f"rank {first_rank}{at} failed: {_cause(first)}"]
    others = [rank for rank in sorted(failures) if rank != first_rank]
    if _distance(first, ended) < _FOLLOWED:
        lines += [f"rank {rank} was ended, or failed after it" for rank in others]
        return "\n".join([*lines, *log])
    # none is known to be the cause, but their positions may tell
    where = {rank: positions[rank] if rank < len(positions) else "" for rank in others}
    lines += [f"rank {rank} was ended, or failed as well{f' ({at})' if at else ''}" for rank, at in where.items()]
    return "\n".join([*lines, *_too_late([] if logs_in is None else [log_of(logs_in, rank) for rank in failures]), *log])


def _too_late(logs: Sequence[Path]) -> list[str]:
    """Return what NCCL's watchdog left in the logs, without repetitions."""
    found = []
    for log in logs:
        if log.exists():
            with log.open("rb") as file:
                file.seek(max(log.stat().st_size - _LOG_BYTES, 0))
                found += _TOO_LATE.findall(file.read().decode(errors="replace"))[:1]
    return [f"NCCL waited too long: {line}" for line in dict.fromkeys(found)]


def _distance(failure: Any, ended: Set[int]) -> int:
    """Rank failures by distance from the cause: killed from outside; raised or exited; aborted; lost a peer; ended by us.

    An abort may be a crash in itself, but under NCCL the watchdog aborts every process that waits for a failed one.
    """
    raised = _recorded(failure)
    if raised is not None:
        return 3 if _LOST.search(raised) else 1
    if failure.pid in ended:
        return 4
    if failure.exitcode == -signal.SIGABRT:
        return _FOLLOWED
    return 0 if failure.exitcode < 0 else 1


def _recorded(failure: Any) -> str | None:
    """Return the exception that a process recorded before it ended."""
    if not isinstance(failure.message, dict):
        return None
    details = failure.message.get("extraInfo", {})
    return str(details.get("py_callstack") or failure.message.get("message"))


def _cause(failure: Any) -> str:
    raised = _recorded(failure)
    if raised is not None:
        return raised if wants_whole() else brief(raised)
    if failure.exitcode == -signal.SIGABRT:
        return "aborted (SIGABRT): NCCL's watchdog does so after distributed.timeout_minutes, and C++ code that crashes"
    if failure.exitcode < 0:
        return f"killed by {signal.Signals(-failure.exitcode).name}"
    known = " (128 + SIGKILL: often for want of memory)" if failure.exitcode == 128 + signal.SIGKILL else ""
    return f"it ended with exit code {failure.exitcode}{known} and without an exception, as after os._exit"


def brief(traceback: str) -> str:
    """Return the message of the last exception in a chain, preceded by the user's lines that led to the first.

    Args:
        traceback: as Python prints it.
    """
    blocks, own = _blocks(traceback), _users_lines(traceback)
    lines = blocks[-1].splitlines()
    begin = next((number for number, line in enumerate(lines) if number and not line.startswith("  ")), 0)
    message = re.sub(r"^autofunc\.errors\.\w+: ", "", "\n".join(lines[begin:]))
    return "\n".join([*([HEADING, *own] if own else []), message, HINT])


def names_users_lines(traceback: str) -> bool:
    """Return whether the first exception of a chain passed through the user's code."""
    return bool(_users_lines(traceback))


def _users_lines(traceback: str) -> list[str]:
    return [
        line_of_user(file, int(line), name, code)
        for file, line, name, code in _FRAME.findall(_blocks(traceback)[0])
        if not is_installed(file)
    ]


def _blocks(traceback: str) -> list[str]:
    """Split a chain into its exceptions, the first one first."""
    return re.split(r"\n\n(?:The above exception was|During handling of)[^\n]*\n\n", traceback.strip("\n"))


_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)\n    (.*)', re.MULTILINE)
