"""A worker process: it writes its exception down for the launcher, and does not outlive it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from autofunc.errors import AutofuncError, PipelineRunError, full_message
from autofunc.runtime.position import here

WORKER_FAILED = 1
LAUNCHER = "AUTOFUNC_LAUNCHER"
"""Environment variable: id of the process that started the workers."""

POSITIONS = "AUTOFUNC_POSITIONS"
"""Environment variable: the file in which each worker writes down where it is; see `runtime.position`."""

_LOOK_SECONDS = 0.5


def positions_file() -> Path | None:
    """Where workers write down where they are; None for those that something else than `launch` started."""
    named = os.environ.get(POSITIONS)
    return Path(named) if named else None


def run_worker(work: Callable[[], None]) -> None:
    """Run a worker's part. Its exception is recorded for the launcher, which shows it once, and ends the process."""
    from torch.distributed.elastic.multiprocessing.errors import record

    launcher, positions = os.environ.get(LAUNCHER), positions_file()
    if launcher is not None:
        threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()
    if positions is not None:
        here.publish(positions, int(os.environ["RANK"]))
    try:
        record(_without_exit(work))()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # whoever waits for this process sees what ended it
    except Exception as error:
        if not is_recorded():  # nobody else tells
            if isinstance(error, AutofuncError):
                sys.stderr.write(f"error: {full_message(error)}\n")
            else:
                traceback.print_exc()
        # the process group may be waiting in other threads: leave without its shutdown, so that nothing hangs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(WORKER_FAILED)


def is_recorded() -> bool:
    """Whether who started this process shows the exception that it writes down: torch's launcher does."""
    return "TORCHELASTIC_ERROR_FILE" in os.environ


def _without_exit(work: Callable[[], None]) -> Callable[[], None]:
    """`sys.exit` in a model or a dataset is a failure like any other."""

    def run() -> None:
        try:
            work()
        except SystemExit as left:
            raise PipelineRunError(f"it called sys.exit({left.code!r})") from left

    return run


def _end_with(launcher: int) -> None:
    """Leave when the launcher is gone, however it went: nobody reads the results, and the devices are wanted."""
    while os.getppid() == launcher:
        time.sleep(_LOOK_SECONDS)
    positions = positions_file()
    if positions is not None:
        shutil.rmtree(positions.parent, ignore_errors=True)  # another worker may be at it too
    os._exit(WORKER_FAILED)
