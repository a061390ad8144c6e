"""Where the start of a command goes: with `AUTOFUNC_TIMING=1` it says what it has done, and how long each part took.

A line on standard error for each part: who, seconds since the command began, seconds of this part, and what it was. Of the
ranks of a run only the first speaks, until its first step is done.
"""

from __future__ import annotations

import os
import sys
import time


class _Clock:
    """Of this process; it is made when the process begins."""

    def __init__(self) -> None:
        rank = os.environ.get("RANK")
        self._is_on = os.environ.get("AUTOFUNC_TIMING") == "1" and rank in (None, "0")
        self._who = "command" if rank is None else f"rank {rank}"
        self.began = self._last = time.time()  # of the day, which all processes have in common

    def becomes(self, rank: int, began: float) -> None:
        """From now on this process is a rank of a command that began then."""
        self._is_on, self._who = self._is_on and rank == 0, f"rank {rank}"
        self.began, self._last = began, time.time()

    def done(self, what: str) -> None:
        """A part is done, which took all time since the one before."""
        if self._is_on:
            now = time.time()
            sys.stderr.write(f"timing: {self._who} {now - self.began:6.2f} s (+{now - self._last:.2f}) {what}\n")
            self._last = now

    def stop(self) -> None:
        """The start is over: nothing is said of what comes."""
        self._is_on = False


clock = _Clock()
"""Of this process."""
