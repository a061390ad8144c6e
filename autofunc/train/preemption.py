"""Graceful end by SIGTERM: the run finishes its step; `agreed.py` makes all processes agree on which one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Records whether this process was told to end."""

    def __init__(self) -> None:
        self.is_asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.is_asked = True


@contextmanager
def noticed() -> Iterator[Stop]:
    """Record SIGTERM instead of ending."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
