"""torch's elastic agent with forked workers: it starts, restarts and ends them.

The methods are those that `SimpleElasticAgent` asks of an agent. torch's own agent can fork too, but reports the first
failure only, which often is not the cause.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, SimpleElasticAgent, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from autofunc.runtime.position import make_file, read_file
from autofunc.timing import clock
from autofunc.train.blame import report
from autofunc.train.flight_recorder import FlightRecorder
from autofunc.train.fork_server import ForkServer
from autofunc.train.role import CHECKED, POSITIONS

_LOOK_SECONDS = 0.2
_TOGETHER_SECONDS = 0.2  # after a failure: time for simultaneous failures to show


class ForkingAgent(SimpleElasticAgent):
    """Runs this machine's workers until all have ended.

    Args:
        spec: how many workers to start, and how often to restart them.
        server: forks them.
        work: runs in each worker; picklable.
        folder: for positions and errors.
        asked: signals that asked this process to end; grows.
        seconds_to_end: grace period before workers are killed.
        show: called with failures that are followed by a restart.
        logs_in: the run's folder, with one log per rank.
        recorder: NCCL's flight recorder, if workers compute on GPUs.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        server: ForkServer,
        work: Callable[[], None],
        folder: Path,
        asked: Sequence[signal.Signals],
        seconds_to_end: float,
        show: Callable[[str], None],
        logs_in: Path | None = None,
        recorder: FlightRecorder | None = None,
    ) -> None:
        super().__init__(spec)
        self._server, self._work, self._folder, self._asked = server, work, folder, asked
        self._seconds_to_end, self._show, self._logs_in = seconds_to_end, show, logs_in
        self._recorder, self._started = recorder, 0.0
        self._starts = 0
        self._ranks: dict[int, int] = {}  # by process id
        self._running: set[int] = set()
        self._exit_codes: dict[int, int] = {}  # by rank; ended workers only
        self.report = ""  # of the last failure

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._starts, self._started = self._starts + 1, time.time()
        make_file(self._positions, len(worker_group.workers))
        variables = [self._variables(worker_group, worker) for worker in worker_group.workers]
        pids = self._server.fork(self._work, variables, self._folder)
        clock.done("forking the workers")
        self._ranks = {pid: worker.global_rank for pid, worker in zip(pids, worker_group.workers, strict=True)}
        self._running, self._exit_codes = set(pids), {}
        return {worker.local_rank: pid for pid, worker in zip(pids, worker_group.workers, strict=True)}

    def _variables(self, group: WorkerGroup, worker: Any) -> dict[str, str]:
        """The variables that `torchrun` sets, so that a worker sees the same environment under either."""
        return {
            "RANK": str(worker.global_rank), "LOCAL_RANK": str(worker.local_rank), "ROLE_RANK": str(worker.role_rank),
            "GROUP_RANK": str(group.group_rank), "WORLD_SIZE": str(worker.world_size),
            "LOCAL_WORLD_SIZE": str(group.spec.local_world_size), "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size), "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port), CHECKED: "1", POSITIONS: str(self._positions),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            "TORCHELASTIC_USE_AGENT_STORE": str(group.spec.rdzv_handler.use_agent_store),
            "TORCHELASTIC_RESTART_COUNT": str(self._starts - 1), "TORCHELASTIC_MAX_RESTARTS": str(group.spec.max_restarts),
            "TORCHELASTIC_ERROR_FILE": str(self._error_file(worker.global_rank)),
            **({} if self._recorder is None else self._recorder.variables()),
        }  # fmt: skip

    @property
    def _positions(self) -> Path:
        return self._folder / f"positions-{self._starts}"

    def _error_file(self, rank: int) -> Path:
        return self._folder / f"error-{self._starts}-{rank}.json"

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Look at the workers; after a failure, or when this process must end, end the remaining ones first."""
        self._take(_LOOK_SECONDS)
        if self._asked:
            self._end_all(self._asked[0])
            if any(self._exit_codes.values()):
                raise SystemExit(128 + self._asked[0])
        elif self._running and not any(self._exit_codes.values()):
            return RunResult(WorkerState.HEALTHY)
        if not any(self._exit_codes.values()):
            return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(self._exit_codes))
        time.sleep(_TOGETHER_SECONDS)
        self._take(0.0)
        ended = self._end_all(signal.SIGTERM)
        failures = {
            rank: ProcessFailure(rank, pid, self._exit_codes[rank], str(self._error_file(rank)))
            for pid, rank in self._ranks.items()
            if self._exit_codes[rank] != 0
        }
        left_by_nccl = [] if self._recorder is None else self._recorder.dumps(self._started)
        found = report(failures, ended, read_file(self._positions), self._logs_in)
        self.report = "\n".join([found, *left_by_nccl])
        left = worker_group.spec.max_restarts - self._starts + 1
        if left > 0:
            self._show(f"{self.report}\nstarting again ({self._starts} of {worker_group.spec.max_restarts})")
        return RunResult(WorkerState.FAILED, failures=failures)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._end_all(death_sig)

    def _end_all(self, number: signal.Signals) -> frozenset[int]:
        """Ask running workers to end, kill those that do not; return the process ids that were signalled."""
        if not self._running:
            return frozenset()
        signalled, until, times = self._server.signal(number), time.monotonic() + self._seconds_to_end, len(self._asked)
        while self._running and time.monotonic() < until and len(self._asked) == times:  # a second request ends the wait
            self._take(_LOOK_SECONDS)
        if self._running:
            signalled |= self._server.signal(signal.SIGKILL)
        while self._running:
            self._take(_LOOK_SECONDS)
        return signalled

    def _take(self, seconds: float) -> None:
        for each in self._server.ended(seconds):
            self._running.discard(each.pid)
            self._exit_codes[self._ranks[each.pid]] = each.exitcode
