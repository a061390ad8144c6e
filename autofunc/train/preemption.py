"""A run that is told to end, by SIGTERM: it finishes its step; `agreed.py` says which that is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether this process was told to end."""

    def __init__(self) -> None:
        self.is_asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal."""
        self.is_asked = True


@contextmanager
def noticed() -> Iterator[Stop]:
    """Note SIGTERM instead of being ended by it."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
