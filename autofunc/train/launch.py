"""Start the worker processes of a run, and end them all when one fails.

torch's elastic launcher starts them with the environment that `torchrun` gives, so a worker is the same command as one
under the user's own `torchrun`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from autofunc.errors import AutofuncError, PeerLostError, PipelineRunError, full_message

WORKER_FAILED = 1
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
    )
    try:
        with (
            _environment({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), _CHECKED: "1", **environment}),
            _silent(),
        ):
            elastic_launch(config, sys.executable)("-m", "autofunc", *arguments)
    except ChildFailedError as failed:
        raise PipelineRunError(_report(failed)) from None
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


@contextmanager
def _silent() -> Iterator[None]:
    """The launcher logs its own report of a failure; ours says it once and names the cause."""
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_worker(work: Callable[[], None]) -> None:
    """Run a worker's part. Its exception is recorded for the launcher, which shows it once, and ends the process."""
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(work)()
    except Exception as error:
        if (
            "TORCHELASTIC_ERROR_FILE" not in os.environ
        ):  # started by something else than torch's launcher: nobody else tells
            if isinstance(error, AutofuncError):
                sys.stderr.write(f"error: {full_message(error)}\n")
            else:
                traceback.print_exc()
        # the process group may be waiting in other threads: leave without its shutdown, so that nothing hangs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(WORKER_FAILED)


def _report(failed: object) -> str:
    failures = getattr(failed, "failures", {})
    first_rank, first = min(failures.items(), key=lambda item: (_is_victim(item[1]), item[1].timestamp))
    lines = [f"rank {first_rank} failed: {_cause(first)}"]
    lines += [f"rank {rank} was ended, or failed after it" for rank in sorted(failures) if rank != first_rank]
    return "\n".join(lines)


def _is_victim(failure: object) -> int:
    """Sorts first what was killed from outside, then what raised, then what lost a peer or was ended by the launcher."""
    code = int(getattr(failure, "exitcode", 0))
    if code == -signal.SIGTERM or PeerLostError.__name__ in _cause(failure):
        return 2
    return 0 if code < 0 else 1


def _cause(failure: object) -> str:
    code = int(getattr(failure, "exitcode", 0))
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    message = getattr(failure, "message", "")
    if isinstance(message, dict):
        details = message.get("extraInfo", {})
        return str(details.get("py_callstack") or message.get("message"))
    return str(message) or f"exit code {code}"
