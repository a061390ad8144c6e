"""Ends a run that makes no progress, and reports the reason like other errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from autofunc.config.schema import Distributed
from autofunc.errors import HangError
from autofunc.runtime.position import read_file
from autofunc.runtime.watchdog import watchdog
from autofunc.train.flight_recorder import keep_record
from autofunc.train.logs import write_log
from autofunc.train.role import positions_file
from autofunc.train.worker import is_recorded

_BEFORE_TIMEOUT = 0.9  # of the process group's timeout, whose own error tells less


@contextmanager
def watched(config: Distributed) -> Iterator[None]:
    """Watch this process of a run, see `runtime.watchdog`.

    Args:
        config: has the timeouts.
    """
    file = positions_file()
    with watchdog(
        step_timeout_seconds=config.step_timeout_seconds,
        first_step_timeout_seconds=_BEFORE_TIMEOUT * 60 * config.timeout_minutes,
        on_hang=_record if is_recorded() else None,
        positions=lambda: read_file(file) if file is not None else (),
        on_alarm=keep_record,
    ):
        yield


def _record(error: HangError) -> None:
    """Record the error for the launcher, which shows it."""
    write_log(f"{error}\n")
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise error
    except HangError:  # the recorder writes the exception being handled
        get_error_handler().record_exception(error)
