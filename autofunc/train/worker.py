"""A worker process: records its exception for the launcher, does not outlive it, and skips Python's final teardown.

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
    """Run a worker's part, and end the process. The launcher shows the recorded exception once."""
    from torch.distributed.elastic.multiprocessing.errors import record

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless it was started to ignore it, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a KeyboardInterrupt in a weak reference's callback ends nothing
    parent, positions = os.environ.get(PARENT), positions_file()
    if parent is not None:
        threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    if positions is not None:
        here.publish(positions, int(os.environ["RANK"]))
    try:
        record(_without_exit(work))()
    except KeyboardInterrupt:  # raised by the work
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # so that the parent sees what ended this process
    except Exception as error:
        if not is_recorded():  # nothing else shows it
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
    """End the process as Python does, except for its final teardown.

    Threads of gloo outlive their groups, and now and then one ended the process with SIGABRT ("terminate called without an
    active exception") during that teardown, after all work was done.
    """
    threads: Any = threading
    threads._shutdown()  # waits for non-daemon threads
    atexit._run_exitfuncs()
    for each in gc.get_objects():
        if issubclass(type(each), io.IOBase) and not each.closed:  # files left open
            with suppress(OSError, ValueError):
                each.flush()
    os._exit(0)


def is_recorded() -> bool:
    """Return whether the process that started this one shows its recorded exception, as torch's launcher does."""
    return "TORCHELASTIC_ERROR_FILE" in os.environ


def _without_exit(work: Callable[[], None]) -> Callable[[], None]:
    """Turn `sys.exit` in a model or a dataset into a failure like any other."""

    def run() -> None:
        try:
            work()
        except SystemExit as left:
            raise PipelineRunError(f"it called sys.exit({left.code!r})") from left

    return run


def _end_with(parent: int) -> None:
    """Exit when the process that forked this one is gone, for whatever reason: nobody reads the results."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    positions = positions_file()
    if positions is not None:
        shutil.rmtree(positions.parent, ignore_errors=True)  # another worker may be removing it too
    os._exit(WORKER_FAILED)
