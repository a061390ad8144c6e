"""A pool of gloo worker processes: starting torch for each test would cost seconds.

Workers are forked from a server that has imported torch, so that each costs milliseconds and they share that memory. The
server has one thread and never computes, which makes the fork safe.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SECONDS_FOR_ONE_CALL = 120.0
SECONDS_TO_END = 10.0
PRELOADED = [
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch._inductor.compile_fx", "tensordict", "autofunc.pipe",
    "transformers.models.gpt2.modeling_gpt2", "tests.cases",
]  # fmt: skip


class WorkerPool:
    """`size` processes that are one gloo world. `run(function, *arguments)` calls the function on every rank."""

    def __init__(self, size: int) -> None:
        self.size, self.seconds_for_one_call = size, SECONDS_FOR_ONE_CALL
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        store = Path(self._folder.name) / "store"
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
        try:
            answers = self._call(function, arguments)
        except BaseException:  # also Ctrl-C: whoever is still in the call would answer the next one
            self.close()
            self._start()
            raise
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[tuple[bool, Any]]:
        answers = []
        for rank, end in enumerate(self._ends):
            try:
                end.send((function, arguments))
            except OSError as error:
                raise AssertionError(f"rank {rank}: its process is gone") from error
        for rank, end in enumerate(self._ends):
            limit = self.seconds_for_one_call
            assert end.poll(limit), f"rank {rank}: did not answer within {limit} s"
            try:
                answers.append(end.recv())
            except (EOFError, OSError) as error:
                raise AssertionError(f"rank {rank}: {error or 'its process is gone'}") from error
        return answers

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()
        for end in self._ends:
            end.close()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, arguments = end.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            end.send((True, function(*arguments)))
        except BaseException:  # whatever it was, the test must see it
            end.send((False, traceback.format_exc()))


def _end_with(sentinel: int) -> None:
    """End this process when the one that started the pool is gone, even in the middle of a call."""
    wait([sentinel])
    os._exit(1)
