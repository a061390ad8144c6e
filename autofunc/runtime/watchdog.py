"""A watchdog that ends a run without progress, and reports who waits for whom.

Every process has a thread that watches its `position`. If that has not changed for too long, the thread raises an alarm in
the store that the processes were started with. Each process then writes its state there, and the one that asked assembles
the report. It ends its process, and the launcher ends the others: a thread inside a collective cannot be interrupted.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from autofunc.errors import AutofuncError, HangError
from autofunc.runtime.hang import Frame, State, describe, frames_of
from autofunc.runtime.position import here

_LEAST_SECONDS = 60.0  # lower bound of the limit scaled from the slowest step: disks and networks pause
_TIMES_SLOWEST = 20.0
_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 10.0  # how long a process may take to answer
_ALARM, _VERDICT = "alarm", "verdict"
_numbers = itertools.count()  # of this process's watchdogs; the same on all processes

Positions = Callable[[], Sequence[str]]
"""Returns the last recorded position of every rank."""


@contextmanager
def watchdog(
    *,
    step_timeout_seconds: float | None = None,
    first_step_timeout_seconds: float = 540.0,
    on_hang: Callable[[HangError], None] | None = None,
    positions: Positions = lambda: (),
    on_alarm: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """End the process if its steps make no progress in this context, and report which rank is late and what it does.

    Every process of a run uses one, after creating its process group.

    Args:
        step_timeout_seconds: how long a rank may stay at one action. By default 20 times the slowest step so far, at least
            60; a given number also applies to the first step, but not to building and compiling a pipeline.
        first_step_timeout_seconds: the limit while durations are unknown: in a first step, and while building a pipeline.
        on_hang: called with the error before the process ends; by default it goes to stderr.
        positions: returns the last recorded position of every rank, for ranks that do not answer.
        on_alarm: called by every process, in the watchdog's thread, when one of several makes no progress.

    Raises:
        AutofuncError: for a timeout that is not positive, and inside another watchdog.

    Example:
        with af.watchdog(step_timeout_seconds=120):
            for batch in loader:
                loss, grads = step(params, batch)
    """
    for given in (step_timeout_seconds, first_step_timeout_seconds):
        if given is not None and not given > 0:
            raise AutofuncError(f"a timeout of {given} seconds; expected a number above 0")
    if here.is_on:
        raise AutofuncError("a watchdog inside another: one per process is enough")
    watch = _Watch(step_timeout_seconds, first_step_timeout_seconds, on_hang or _tell, positions, on_alarm)
    # durations of an earlier run in this process may not apply
    here.is_on, here.is_settled, here.slowest_step_seconds = True, False, 0.0
    watch.start()
    try:
        yield
    finally:
        watch.ended.set()
        here.is_on = False
        watch.join()


def _tell(error: HangError) -> None:
    sys.stderr.write(f"error: {error}\n")


class _Watch(threading.Thread):
    """Watches this process, and answers other processes' alarms."""

    def __init__(
        self, given: float | None, first: float, on_hang: Callable[[HangError], None], positions: Positions,
        on_alarm: Callable[[], None],
    ) -> None:  # fmt: skip
        super().__init__(name="autofunc watchdog", daemon=True)
        self.ended = threading.Event()
        self._given, self._first, self._on_hang, self._positions = given, first, on_hang, positions
        self._on_alarm = on_alarm
        self._thread = threading.get_ident()
        self._rank, self._size = 0, 1
        self._store: Any = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._size = dist.get_rank(), dist.get_world_size()
            # a separate connection: a main thread waiting in the store keeps its connection busy
            store = dist.group.WORLD.get_group_store().clone()  # type: ignore[union-attr]
            self._store = dist.PrefixStore(f"autofunc/watchdog/{next(_numbers)}", store)
        self._answered = self._alarms()
        self._changes, self._since = here.changes, time.monotonic()

    def run(self) -> None:
        """Look every half second, less often with many processes: all of them query one store."""
        pause = _LOOK_SECONDS * max(1.0, self._size / 256)
        while not self.ended.wait(pause):
            if here.changes != self._changes:
                self._changes, self._since = here.changes, time.monotonic()
            try:
                if self._answer() or self._silent() <= self._limit():
                    continue
                text = self._ask()
            except dist.DistError as error:  # the store's host is gone, and the launcher will end this process too
                text = f"{describe({self._rank: self._state()})}\nand nothing is known about other ranks: {error}"
            if text is not None:
                self._end(text)
            self._since = time.monotonic()  # other ranks have longer limits: wait one more period

    # --- this process

    def _limit(self) -> float:
        if not here.is_settled:
            in_step = here.program is not None
            return self._given if in_step and self._given is not None else self._first
        scaled = max(_LEAST_SECONDS, _TIMES_SLOWEST * here.slowest_step_seconds)
        return self._given or min(scaled, self._first)

    def _silent(self) -> float:
        return time.monotonic() - self._since

    def _state(self) -> State:
        stack = frames_of(sys._current_frames().get(self._thread))
        return State(here.phase, here.action, tuple(here.awaited()), self._silent(), self._limit(), stack)

    # --- all processes

    def _alarms(self) -> int:
        return 0 if self._store is None else int(self._store.add(_ALARM, 0))

    def _answer(self) -> bool:
        """Write this process's state to the store if there were new alarms; return whether there were."""
        asked = self._alarms()
        if asked > self._answered:
            self._on_alarm()  # before answering: the asking process ends the run once all have answered
        for alarm in range(self._answered + 1, asked + 1):
            self._store.set(_key(alarm, self._rank), json.dumps(asdict(self._state())))
        answered, self._answered = self._answered, asked
        return asked > answered

    def _ask(self) -> str | None:
        """Return the report; None if a rank is within its own limit or in a debugger, or another process has reported."""
        if self._state().is_looked_into:
            return None
        if self._store is None:
            return describe({self._rank: self._state()}, self._positions())
        asked = int(self._store.add(_ALARM, 1))
        states: dict[int, State | None] = {}
        until = time.monotonic() + _ANSWER_SECONDS
        for rank in range(self._size):
            states[rank] = self._of(_key(asked, rank), until)
        known = [state for state in states.values() if state is not None]
        if any(state.is_looked_into for state in known):
            return None
        if any(not state.waits and state.silent_seconds < state.limit_seconds for state in known):
            return None
        return describe(states, self._positions()) if self._store.add(_VERDICT, 1) == 1 else None

    def _of(self, key: str, until: float) -> State | None:
        while not self._store.check([key]):
            self._answer()  # this alarm, and those of others that ask at the same time
            if time.monotonic() > until:
                return None
            time.sleep(_LOOK_SECONDS / 5)
        found = json.loads(self._store.get(key))
        found["stack"] = tuple(Frame(**frame) for frame in found["stack"])
        return State(**{**found, "awaited": tuple(found["awaited"])})

    def _end(self, text: str) -> None:
        error = HangError(f"no progress for {self._silent():.0f} s (step_timeout_seconds: {self._limit():.0f})\n{text}")
        try:
            self._on_hang(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            leave()


def leave() -> None:
    """End the process at once: its main thread is stuck and could not return."""
    os._exit(1)


def _key(alarm: int, rank: int) -> str:
    return f"{alarm}/{rank}"
