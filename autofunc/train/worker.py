"""A worker process: it writes its exception down for the launcher, does not outlive it, and ends without Python's own end.

Private parts of Python used, tried with 3.11: `threading._shutdown` (as in `multiprocessing`), `atexit._run_exitfuncs`.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from autofunc.errors import AutofuncError, PipelineRunError, full_message
from autofunc.runtime.position import here
from autofunc.train.role import PARENT, positions_file

WORKER_FAILED = 1
_LOOK_SECONDS = 0.5


def run_worker(work: Callable[[], None]) -> None:
    """Run a worker's part, and end the process. Its exception is recorded for the launcher, which shows it once."""
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
    leave_in_order()


def leave_in_order() -> None:
    """End the process as Python does, but for what it does last: to take itself apart.

    Threads of gloo outlive their groups, and now and then one ended the process with SIGABRT ("terminate called without an
    active exception") while Python was taken apart, after all was done.
    """
    threads: Any = threading
    threads._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for each in gc.get_objects():
        if issubclass(type(each), io.IOBase) and not each.closed:  # files that nobody has closed
            with suppress(OSError, ValueError):
                each.flush()
    os._exit(0)


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
