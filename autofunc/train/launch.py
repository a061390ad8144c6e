"""Start the worker processes of a run, and end them all when one fails.

torch's elastic launcher starts them with the environment that `torchrun` gives, so a worker is the same command as one
under the user's own `torchrun`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from autofunc.errors import PipelineRunError
from autofunc.runtime.position import make_file, read_file
from autofunc.train.blame import report
from autofunc.train.worker import LAUNCHER, POSITIONS

_CHECKED = "AUTOFUNC_CHECKED"


def is_worker() -> bool:
    """Whether this process was started by torchrun, or by `launch`."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def was_checked() -> bool:
    """Whether `launch` started this process: then the one that called it has tried the configuration."""
    return os.environ.get(_CHECKED) == "1"


def launch(num_processes: int, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `python -m autofunc ARGUMENTS` in several processes on this machine and wait for them.

    Args:
        num_processes: how many.
        arguments: of the command, which the caller has checked.
        environment: variables that the processes have besides this one's.

    Raises:
        PipelineRunError: when one fails; holds the traceback of the first that did. All others have been ended.
        SystemExit: when this process is interrupted or told to end.
    """
    with TemporaryDirectory(prefix="autofunc-") as folder, _ended_by_launcher() as ended:
        positions = Path(folder) / "positions"
        make_file(positions, num_processes)
        _run(num_processes, arguments, {**environment, POSITIONS: str(positions)}, folder, ended)


def _run(
    num_processes: int, arguments: Sequence[str], environment: Mapping[str, str], folder: str, ended: Set[int]
) -> None:  # fmt: skip
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=f"autofunc-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        local_addr="127.0.0.1",  # the machine's own name need not resolve
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), _CHECKED: "1", LAUNCHER: str(os.getpid())}
    try:
        with _environment({**own, **environment}):
            elastic_launch(config, sys.executable)("-m", "autofunc", *arguments)
    except ChildFailedError as failed:
        raise PipelineRunError(report(failed.failures, ended, read_file(Path(environment[POSITIONS])))) from None
    except SignalException as stopped:  # the launcher has ended the workers
        sys.exit(128 + stopped.sigval)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The launcher gives its workers this process's environment, so they are set here for as long as it runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Ended(logging.Handler):
    """Notes the processes that torch's launcher says it ends."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.pids: set[int] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Of "Sending process %s closing signal %s" and "Unable to shutdown process %s ...", the process."""
        if isinstance(record.args, tuple) and "process %s" in str(record.msg) and record.args:
            self.pids.add(int(str(record.args[0])))


@contextmanager
def _ended_by_launcher() -> Iterator[Set[int]]:
    """The launcher logs its own report of a failure; ours says it once. What it ends is told by its log alone."""
    logger, handler = logging.getLogger("torch.distributed.elastic"), _Ended()
    before = logger.level, logger.propagate, logger.handlers
    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers = False, [handler]
    try:
        yield handler.pids
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1], before[2]
