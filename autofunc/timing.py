"""Timing of a command's start: with `AUTOFUNC_TIMING=1` it prints what it has done, and how long each part took.

Each part is a line on standard error: process, seconds since the command began, seconds of this part, and its name. Among
the ranks of a run only the first prints, until its first step is done.
"""

from __future__ import annotations

import os
import sys
import time


class _Clock:
    """The clock of this process, created when the process begins."""

    def __init__(self) -> None:
        rank = os.environ.get("RANK")
        self._is_on = os.environ.get("AUTOFUNC_TIMING") == "1" and rank in (None, "0")
        self._who = "command" if rank is None else f"rank {rank}"
        self.began = self._last = time.time()  # wall clock, which all processes share

    def becomes(self, rank: int, began: float) -> None:
        """Turn this process's clock into that of a rank, of a command that began at the given time."""
        self._is_on, self._who = self._is_on and rank == 0, f"rank {rank}"
        self.began, self._last = began, time.time()

    def done(self, what: str) -> None:
        """Report a part as done; it took all time since the last one."""
        if self._is_on:
            now = time.time()
            sys.stderr.write(f"timing: {self._who} {now - self.began:6.2f} s (+{now - self._last:.2f}) {what}\n")
            self._last = now

    def stop(self) -> None:
        """End the start: print nothing from now on."""
        self._is_on = False


clock = _Clock()
"""This process's clock."""
