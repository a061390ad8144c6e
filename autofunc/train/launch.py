"""Start the worker processes of a run, and end them all when one fails.

They get the variables that `torchrun` gives, so that a worker finds what it would find under the user's own `torchrun`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from autofunc.errors import PipelineRunError
from autofunc.runtime.position import make_file, read_file
from autofunc.timing import clock
from autofunc.train.blame import report
from autofunc.train.fork_server import ForkServer
from autofunc.train.role import CHECKED, POSITIONS

_HOST = "127.0.0.1"  # the machine's own name need not resolve
_LOOK_SECONDS = 0.2
_TOGETHER_SECONDS = 0.2  # after a failure: what failed at the same time is told by then
_SECONDS_TO_END = 30.0
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(server: ForkServer, num_processes: int, work: Callable[[], None]) -> None:
    """Do a piece of work in several processes on this machine, and wait for them.

    Args:
        server: forks them.
        num_processes: how many.
        work: what each does, with RANK and its like in its environment; picklable.

    Raises:
        PipelineRunError: when one fails; holds the traceback of the first that did. All others have been ended.
        SystemExit: when this process is interrupted or told to end.
    """
    with TemporaryDirectory(prefix="autofunc-") as name, _heeded_signals() as asked:
        folder = Path(name)
        positions = folder / "positions"
        make_file(positions, num_processes)
        store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)  # here, so that nobody else takes its port
        ranks = [_variables(rank, num_processes, store.port, folder) for rank in range(num_processes)]
        pids = server.fork(work, [{**each, POSITIONS: str(positions)} for each in ranks], folder)
        clock.done("forking the workers")
        workers = _Workers(server, pids, folder, asked)
        workers.wait()
        if asked:
            sys.exit(128 + asked[0])
        if workers.failures:
            raise PipelineRunError(report(workers.failures, workers.ended, read_file(positions)))


def _variables(rank: int, num_processes: int, port: int, folder: Path) -> dict[str, str]:
    """As `torchrun` gives them. The last three tell torch that the launcher has the store, and where errors are written."""
    own, all_of_them = str(rank), str(num_processes)
    return {
        "RANK": own, "LOCAL_RANK": own, "ROLE_RANK": own, "GROUP_RANK": "0", "WORLD_SIZE": all_of_them,
        "LOCAL_WORLD_SIZE": all_of_them, "ROLE_WORLD_SIZE": all_of_them, "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": _HOST, "MASTER_PORT": str(port), CHECKED: "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_ERROR_FILE": str(_error_file(folder, rank)),
    }  # fmt: skip


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}.json"


class _Workers:
    """The workers of a run, until all have ended.

    Args:
        server: forked them.
        pids: their process ids, by rank.
        folder: where they write down their errors.
        asked: signals that ask this process to end.
    """

    def __init__(self, server: ForkServer, pids: Sequence[int], folder: Path, asked: Sequence[signal.Signals]) -> None:
        self._server, self._pids, self._folder, self._asked = server, pids, folder, asked
        self._running = set(pids)
        self.failures: dict[int, Any] = {}  # by rank
        self.ended: frozenset[int] = frozenset()  # process ids of those that were told to end after the first failure

    def wait(self) -> None:
        """Until they have all ended: by themselves, or because one failed, or this process is to end."""
        while self._running and not self.failures and not self._asked:
            self._take(_LOOK_SECONDS)
        if self._running and not self._asked:
            time.sleep(_TOGETHER_SECONDS)
        if self._running:
            self.ended = self._end(self._asked[0] if self._asked else signal.SIGTERM)
        if self._running:
            self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> frozenset[int]:
        """Tell those that run to end, and wait until they have, or this process is told so once more."""
        told, until, times = self._server.signal(number), time.monotonic() + _SECONDS_TO_END, len(self._asked)
        while self._running and time.monotonic() < until and len(self._asked) == times:
            self._take(_LOOK_SECONDS)
        return told

    def _take(self, seconds: float) -> None:
        for each in self._server.ended(seconds):
            rank = self._pids.index(each.pid)
            self._running.discard(each.pid)
            if each.exitcode != 0:
                file = str(_error_file(self._folder, rank))
                self.failures[rank] = ProcessFailure(rank, each.pid, each.exitcode, file)


@contextmanager
def _heeded_signals() -> Iterator[list[signal.Signals]]:
    """Notes the signals that ask this process to end, but not those that it was started to ignore, as by nohup."""
    asked: list[signal.Signals] = []
    heeded = [each for each in _STOPPING if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, lambda number, _: asked.append(signal.Signals(number))) for each in heeded}
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
