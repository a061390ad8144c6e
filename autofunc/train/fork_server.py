"""A process that has imported torch and forks a run's workers, each in milliseconds instead of seconds.

It is forked from the launcher right after its imports. It has a single thread, has computed nothing and has touched no GPU,
so forking it is safe, even after a failure. It ends whenever the launcher does, for whatever reason, and ends all workers
with it.

This file is the launcher's side; the process runs `forking.serve`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from autofunc.errors import PipelineRunError
from autofunc.train.forking import Ended, Fork, Signal, Signalled, serve

_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from multiprocessing.connection import Connection; "
    "from autofunc.train.forking import serve; serve(Connection(int(sys.argv[1])), sys.argv[2].split())"
)
_SECONDS_TO_END, _LOOK_SECONDS = 10.0, 0.005


class ForkServer(AbstractContextManager["ForkServer"]):
    """The fork server; it ends with this context. Create it by `forked` or `started`.

    Args:
        connection: to the process.
        pid: its process id.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection, self._pid = connection, pid
        self._status: int | None = None  # exit code, once it has ended
        self._ended: list[Ended] = []
        self._has_forked = False

    @classmethod
    def forked(cls, modules: Sequence[str]) -> ForkServer:
        """Fork this process, which must have a single thread. A worker that has finished raises `SystemExit` here.

        Args:
            modules: to import ahead of the first request, on behalf of all workers.
        """
        ours, theirs = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            ours.close()
            os.setsid()  # Ctrl-C is for the launcher
            serve(theirs, modules)
            sys.exit()
        theirs.close()
        return cls(ours, pid)

    @classmethod
    def started(cls, modules: Sequence[str]) -> ForkServer:
        """Start a new process that does its own imports: for a launcher with other threads, whose locks a fork would hold.

        Args:
            modules: see `forked`.
        """
        ours, theirs = Pipe()
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            command = [sys.executable, "-P", "-c", _START, str(theirs.fileno()), " ".join(modules), *sys.path]
            return cls(ours, os.posix_spawn(sys.executable, command, os.environ, setsid=True))

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        if not self._has_forked:  # it may be importing
            os.kill(self._pid, signal.SIGKILL)
        until = time.monotonic() + _SECONDS_TO_END
        while self._exit_code() is None:
            if time.monotonic() > until:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)

    def fork(self, work: Callable[[], None], environments: Sequence[Mapping[str, str]], folder: Path) -> list[int]:
        """Fork a worker for each environment; return their process ids.

        Args:
            work: what each worker runs; picklable.
            environments: each worker's variables.
            folder: removed if this process goes before its workers.
        """
        self._has_forked = True
        self._send(Fork(work, tuple(environments), folder))
        while not isinstance(message := self._receive(), list):
            self._ended.append(message)
        return message

    def ended(self, seconds: float) -> list[Ended]:
        """Return the workers that have ended since the last call, waiting up to `seconds` for one."""
        while self._connection.poll(0 if self._ended else seconds):
            self._ended.append(self._receive())
        found, self._ended = self._ended, []
        return found

    def signal(self, number: signal.Signals) -> frozenset[int]:
        """Send a signal to all running workers and to what they started; return their process ids."""
        self._send(Signal(number))
        while not isinstance(message := self._receive(), Signalled):
            self._ended.append(message)
        return message.pids

    def _send(self, message: Fork | Signal) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._gone() from error

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error

    def _exit_code(self) -> int | None:
        """The process's exit code; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def _gone(self) -> PipelineRunError:
        while (status := self._exit_code()) is None:  # it has closed the connection
            time.sleep(_LOOK_SECONDS)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with code {status}"
        return PipelineRunError(f"the fork server {how}, and its workers ended with it")


def is_alone(seconds: float = 1.0) -> bool:
    """Return whether this process has a single thread, giving threads that are about to end up to `seconds`."""
    until = time.monotonic() + seconds
    while threading.active_count() > 1 and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    return threading.active_count() == 1
