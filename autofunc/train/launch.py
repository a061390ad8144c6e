"""Start a run's worker processes on this machine; end all of them when one fails or this process must end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.agent.server.api import WorkerSpec

from autofunc.errors import PipelineRunError
from autofunc.train.agent import ForkingAgent
from autofunc.train.flight_recorder import FlightRecorder
from autofunc.train.fork_server import ForkServer
from autofunc.train.one_machine import OneMachine

_HOST = "127.0.0.1"  # the machine's own name need not resolve
_SHORTEST = 1e-3  # torch's polling interval; the agent itself waits until a worker has ended
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(
    server: ForkServer,
    num_processes: int,
    work: Callable[[], None],
    *,
    folder: Path | None = None,
    max_restarts: int = 0,
    seconds_to_end: float = 30.0,
    recorder: FlightRecorder | None = None,
) -> None:
    """Run work in several processes on this machine, and wait for them.

    Args:
        server: forks them.
        num_processes: to start.
        work: runs in each, with RANK and the other variables in its environment; picklable.
        folder: of the run, with one log per rank; None without logs.
        max_restarts: how often to restart all after a failure.
        seconds_to_end: grace period for workers that are told to end.
        recorder: NCCL's flight recorder, if workers compute on GPUs.

    Raises:
        PipelineRunError: if a worker fails; holds the traceback of the first failure. All workers have ended by then.
        SystemExit: if this process is interrupted or told to end, unless all workers then exit with status 0.
    """
    with TemporaryDirectory(prefix="autofunc-") as scratch, _heeded_signals() as asked:
        handler = OneMachine(_HOST)
        spec = WorkerSpec(
            role="autofunc", local_world_size=num_processes, entrypoint="autofunc", rdzv_handler=handler,
            max_restarts=max_restarts, monitor_interval=_SHORTEST, master_addr=_HOST, local_addr=_HOST,
        )  # fmt: skip
        agent = ForkingAgent(spec, server, work, Path(scratch), asked, seconds_to_end, _say, folder, recorder)
        try:
            result = agent.run()
        finally:
            handler.shutdown()
        if result.is_failed():
            raise PipelineRunError(agent.report)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def _heeded_signals() -> Iterator[list[signal.Signals]]:
    """Note signals that ask this process to end, except those it was started to ignore, as by nohup."""
    asked: list[signal.Signals] = []
    heeded = [each for each in _STOPPING if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, lambda number, _: asked.append(signal.Signals(number))) for each in heeded}
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
