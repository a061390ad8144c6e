"""A process that has imported torch, and from which the workers of a run are forked: each costs milliseconds, not seconds.

It imports while the launcher checks the configuration. It has one thread, computes nothing and touches no GPU, which makes
its forks safe. It ends when the launcher does, however that goes, and takes all workers with it.

This file is the launcher's side; the process itself runs `forking.serve`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from autofunc.errors import PipelineRunError
from autofunc.train.forking import Ended, Fork, Signal, Signalled

_START = "import sys; sys.path[:] = sys.argv[2:]; from autofunc.train.forking import serve; serve(int(sys.argv[1]))"
_SECONDS_TO_END = 10.0


class ForkServer(AbstractContextManager["ForkServer"]):
    """Starts the process, which begins to import at once. It ends with this context.

    Args:
        modules: that it imports, for all workers.
        environment: variables that it, and so each worker, has besides those of this process: torch reads some when it is
            imported.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-P", "-c", _START, str(theirs.fileno()), *sys.path]
            variables = {**os.environ, **environment}
            self._process = subprocess.Popen(
                command, env=variables, pass_fds=[theirs.fileno()], start_new_session=True
            )  # fmt: skip - in a session of its own: Ctrl-C is for the launcher
        self._connection.send(list(modules))
        self._ended: list[Ended] = []
        self._has_forked = False

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        if not self._has_forked:  # it may be in the middle of an import
            self._process.kill()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def fork(self, work: Callable[[], None], environments: Sequence[Mapping[str, str]], folder: Path) -> list[int]:
        """Fork a worker for each environment; returns their process ids.

        Args:
            work: what each does; it is pickled.
            environments: variables of each.
            folder: removed when this process is gone before its workers.
        """
        self._has_forked = True
        self._send(Fork(work, tuple(environments), folder))
        while not isinstance(message := self._receive(), list):
            self._ended.append(message)
        return message

    def ended(self, seconds: float) -> list[Ended]:
        """The workers that have ended since the last call, after waiting for one as long as that."""
        while self._connection.poll(0 if self._ended else seconds):
            self._ended.append(self._receive())
        found, self._ended = self._ended, []
        return found

    def signal(self, number: signal.Signals) -> frozenset[int]:
        """Send a signal to all workers that have not ended, and to what they started; returns their process ids."""
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

    def _gone(self) -> PipelineRunError:
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"left with exit code {status}"
        return PipelineRunError(f"the process that the workers are forked from {how}, and they have ended with it")
