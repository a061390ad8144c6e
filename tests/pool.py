"""A pool of gloo worker processes that lives as long as the test run: starting torch costs seconds."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS_FOR_ONE_CALL = 120.0


class WorkerPool:
    """`size` processes that are one gloo world. `run(function, *arguments)` calls the function on every rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process ends the connection
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank. The function and its arguments must be picklable; it is called without the rank.

        Raises:
            AssertionError: with the traceback of every rank that failed, or when one does not answer or is gone. Then new
                processes are started for the next call.
        """
        for end in self._ends:
            end.send((function, arguments))
        answers = []
        for rank, end in enumerate(self._ends):
            try:
                assert end.poll(SECONDS_FOR_ONE_CALL), f"rank {rank} did not answer within {SECONDS_FOR_ONE_CALL} s"
                answers.append(end.recv())
            except (AssertionError, EOFError, ConnectionError) as error:
                self.close()
                self._start()
                raise AssertionError(f"rank {rank}: {error or 'its process is gone'}") from error
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.terminate()
            process.join()


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((True, function(*arguments)))
        except BaseException:  # whatever it was, the test must see it
            end.send((False, traceback.format_exc()))
