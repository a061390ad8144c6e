"""Start the worker processes of a run on this machine, and end them all when one fails or this process is told to end."""

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
_SHORTEST = 1e-3  # of the intervals at which torch looks at the agent, which itself waits until a worker has ended
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
    """Do a piece of work in several processes on this machine, and wait for them.

    Args:
        server: forks them.
        num_processes: how many.
        work: what each does, with RANK and its like in its environment; picklable.
        folder: of the run, where each keeps a log; None where there are none.
        max_restarts: how often all are started again after one has failed.
        seconds_to_end: how long they have to end when they are told to.
        recorder: of NCCL, where they compute on GPUs.

    Raises:
        PipelineRunError: when one fails; holds the traceback of the first that did. All others have been ended.
        SystemExit: when this process is interrupted or told to end, unless all end with status 0 then.
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
    """Notes the signals that ask this process to end, but not those that it was started to ignore, as by nohup."""
    asked: list[signal.Signals] = []
    heeded = [each for each in _STOPPING if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, lambda number, _: asked.append(signal.Signals(number))) for each in heeded}
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
