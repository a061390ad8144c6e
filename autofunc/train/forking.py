"""The process that workers are forked from, see `fork_server`: it imports, forks, and tells who has ended."""

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
"""What ps and top call a worker, its rank after it."""

_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Fork:
    """Asked for: a worker for each environment; see `ForkServer.fork`. The answer is a list of process ids."""

    work: Callable[[], None]
    environments: tuple[Mapping[str, str], ...]
    folder: Path


@dataclass(frozen=True)
class Signal:
    """Asked for: a signal to all workers that have not ended."""

    number: signal.Signals


@dataclass(frozen=True)
class Signalled:
    """The answer."""

    pids: frozenset[int]


@dataclass(frozen=True)
class Ended:
    """Told of each worker."""

    pid: int
    exitcode: int  # of one that a signal ended: minus its number


def serve(connection: Connection, modules: Sequence[str]) -> None:
    """Fork when the launcher asks, until it is gone. Returns in a worker only, once its work is done.

    Args:
        connection: to the launcher.
        modules: to import while it asks for nothing.
    """
    gc.disable()  # nothing that is imported goes away
    here = str(Path.cwd())
    if here not in sys.path:  # last, see `autofunc.__main__`
        sys.path.append(here)
    forking, work = _Forking(connection, os.getppid()), None
    with suppress(EOFError, ConnectionError):  # the launcher is gone
        forking.prepare(modules)
        gc.freeze()  # so that collecting garbage touches no memory that is shared; nothing of the user's is there yet
        work = forking.until_worker()
    if work is None:
        forking.end()
        os._exit(0)  # what is imported runs nothing of its own at the end, and takes time to be cleared away
    work()


class _Forking:
    """The workers, and the launcher that asks for them."""

    def __init__(self, connection: Connection, launcher: int) -> None:
        self._connection, self._launcher = connection, launcher
        self._workers: dict[int, int | None] = {}  # that have not ended, or whose end has not been noticed; see `_watched`
        self._folder: Path | None = None

    def prepare(self, modules: Sequence[str]) -> None:
        """Import for the workers, until something is asked for."""
        for name in modules:
            if self._connection.poll():
                return
            importlib.import_module(name)

    def until_worker(self) -> Callable[[], None] | None:
        """In a worker, what it is to do; None when the launcher is gone."""
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
        """Whether the launcher has asked, after waiting for that, or for the end of a worker, for a while."""
        files = [file for file in self._workers.values() if file is not None]
        return self._connection in wait([self._connection, *files], _LOOK_SECONDS)

    def _fork(self, asked: Fork) -> bool:
        """Whether this is a worker."""
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
            os.setpgid(pid, pid)  # here too: a signal may have to reach it before it has come to that itself
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
        """The launcher is gone: nobody reads the results, and the devices are wanted."""
        for pid in self._workers:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in self._workers:
            os.waitpid(pid, 0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _watched(pid: int) -> int | None:
    """A descriptor that can be read once a child has ended; None where the system has none, and it is looked at instead."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # an old kernel, or a container that forbids it
            return os.pidfd_open(pid)
    return None


def _close(file: int | None) -> None:
    if file is not None:
        os.close(file)


def _become_worker(environment: Mapping[str, str]) -> None:
    import numpy as np

    os.setpgid(0, 0)  # with what it starts itself
    os.environ.update(environment)
    os.environ[PARENT] = str(os.getppid())
    gc.enable()
    np.random.seed()  # as in a process that was started: no two draw the same unless they are told to
    comm = Path("/proc/self/comm")
    if comm.exists():  # for ps and top
        comm.write_text(f"{WORKER_NAME}{environment['RANK']}")
