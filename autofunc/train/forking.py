"""The process that forks workers, see `fork_server`: it imports, forks, and reports workers that have ended."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from autofunc.train.role import PARENT

WORKER_NAME = "autofunc rank "
"""Worker name in ps and top; the rank follows."""

_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Fork:
    """Request: fork a worker for each environment, see `ForkServer.fork`. The answer is a list of process ids."""

    work: Callable[[], None]
    environments: tuple[Mapping[str, str], ...]
    folder: Path


@dataclass(frozen=True)
class Signal:
    """Request: send a signal to all running workers."""

    number: signal.Signals


@dataclass(frozen=True)
class Signalled:
    """The answer."""

    pids: frozenset[int]


@dataclass(frozen=True)
class Ended:
    """Report of a worker that has ended."""

    pid: int
    exitcode: int  # minus the signal's number, if a signal ended it


def serve(connection: Connection, modules: Sequence[str]) -> None:
    """Fork at the launcher's requests until it is gone. Returns only in a worker, once its work is done.

    Args:
        connection: to the launcher.
        modules: to import while no request is pending.
    """
    gc.disable()  # imported objects stay
    here = str(Path.cwd())
    if here not in sys.path:  # last, see `autofunc.__main__`
        sys.path.append(here)
    forking, work = _Forking(connection, os.getppid()), None
    with suppress(EOFError, ConnectionError):  # the launcher is gone
        forking.prepare(modules)
        gc.freeze()  # so that garbage collection does not write to shared memory; no user objects exist yet
        work = forking.until_worker()
    if work is None:
        forking.end()
        os._exit(0)  # skips the teardown of imported modules, which takes time and has nothing to do
    work()


class _Forking:
    """The workers, and the launcher that requests them."""

    def __init__(self, connection: Connection, launcher: int) -> None:
        self._connection, self._launcher = connection, launcher
        self._workers: dict[int, int | None] = {}  # running, or ended but not yet noticed; see `_watched`
        self._folder: Path | None = None

    def prepare(self, modules: Sequence[str]) -> None:
        """Import on behalf of the workers, until a request arrives."""
        for name in modules:
            if self._connection.poll():
                return
            importlib.import_module(name)

    def until_worker(self) -> Callable[[], None] | None:
        """Return a worker's job, in the worker; return None when the launcher is gone."""
        while os.getppid() == self._launcher:
            if self._is_asked():
                asked: Fork | Signal = self._connection.recv()
                self._tell_ended()
                if isinstance(asked, Signal):
                    for pid in self._workers:
                        os.killpg(pid, asked.number)
                    self._connection.send(Signalled(frozenset(self._workers)))
                elif self._fork(asked):
                    return asked.work
            self._tell_ended()
        return None

    def _is_asked(self) -> bool:
        """Wait a while for a request or the end of a worker; return whether there is a request."""
        files = [file for file in self._workers.values() if file is not None]
        return self._connection in wait([self._connection, *files], _LOOK_SECONDS)

    def _fork(self, asked: Fork) -> bool:
        """Fork; return whether this process is a worker."""
        self._folder = asked.folder
        pids = []
        for environment in asked.environments:
            pid = os.fork()
            if pid == 0:
                self._connection.close()
                for file in self._workers.values():
                    _close(file)
                _become_worker(environment)
                return True
            os.setpgid(pid, pid)  # in the parent too, in case a signal must reach the worker before it gets there
            pids.append(pid)
            self._workers[pid] = _watched(pid)
        self._connection.send(pids)
        return False

    def _tell_ended(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _close(self._workers.pop(pid))
            self._connection.send(Ended(pid, os.waitstatus_to_exitcode(status)))

    def end(self) -> None:
        """Kill the workers: the launcher is gone, so nobody reads their results."""
        for pid in self._workers:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in self._workers:
            os.waitpid(pid, 0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _watched(pid: int) -> int | None:
    """Return a descriptor that becomes readable once a child has ended; None on systems without one, which poll."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # an old kernel, or a container that forbids it
            return os.pidfd_open(pid)
    return None


def _close(file: int | None) -> None:
    if file is not None:
        os.close(file)


def _become_worker(environment: Mapping[str, str]) -> None:
    import numpy as np

    os.setpgid(0, 0)  # a group with the processes it starts
    os.environ.update(environment)
    os.environ[PARENT] = str(os.getppid())
    gc.enable()
    np.random.seed()  # as in a fresh process: workers draw different numbers unless seeded
    comm = Path("/proc/self/comm")
    if comm.exists():  # for ps and top
        comm.write_text(f"{WORKER_NAME}{environment['RANK']}")
