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

from autofunc.errors import AutofuncError, PipelineRunError, full_message
from autofunc.runtime.position import here
from autofunc.train.role import PARENT, positions_file

WORKER_FAILED = 1
_LOOK_SECONDS = 0.5


def run_worker(work: Callable[[], None]) -> None:
    """Run a worker's part. Its exception is recorded for the launcher, which shows it once, and ends the process."""
    from torch.distributed.elastic.multiprocessing.errors import record

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it was started to ignore it, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a KeyboardInterrupt in a weak reference's callback ends nothing
    parent, positions = os.environ.get(PARENT), positions_file()
    if parent is not None:
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    if positions is not None:
        here.publish(positions, int(os.environ["RANK"]))
    try:
        record(_without_exit(work))()
    except KeyboardInterrupt:  # raised by what it runs
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


def _end_with(parent: int) -> None:
    """Leave when the process that this one was forked from is gone, however it went: then nobody reads the results."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    positions = positions_file()
    if positions is not None:
        shutil.rmtree(positions.parent, ignore_errors=True)  # another worker may be at it too
    os._exit(WORKER_FAILED)
