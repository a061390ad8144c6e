"""Progress of training for people: a bar on a terminal, occasional lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autofunc.engine.compile import LOG
from autofunc.train.logs import bar_console, keep_log_beside_bar

_SECONDS_BETWEEN_LINES = 10.0


class Reporter(Protocol):
    """Receives the training loop's progress."""

    def step(self, step: int, loss: float, speed: str, bubble: float | None = None) -> None:
        """Report a finished step with its loss, speed and, if measured, bubble."""
        ...

    def validating(self, batch: int, num_batches: int) -> None:
        """Report a finished validation batch."""
        ...

    def validation(self, step: int, text: str) -> None:
        """Report the validation loss and metrics."""
        ...

    def note(self, text: str) -> None:
        """Report an event that is not an error."""
        ...


class Silent:
    """Reports nothing; for every rank but the first."""

    def step(self, step: int, loss: float, speed: str, bubble: float | None = None) -> None:
        """See `Reporter.step`."""

    def validating(self, batch: int, num_batches: int) -> None:
        """See `Reporter.validating`."""

    def validation(self, step: int, text: str) -> None:
        """See `Reporter.validation`."""

    def note(self, text: str) -> None:
        """See `Reporter.note`."""


class _Messages(logging.Handler):
    """Forwards log records."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        self._show(record.getMessage())


class ProgressReporter:
    """A progress bar with loss and speed; plain lines if the output is not a terminal."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._last_line, self._bubble = time.monotonic(), ""
        self._compiling = _Messages(self._building)
        self._bar: Progress | None = None
        if console.is_terminal and console.file.isatty():  # not where FORCE_COLOR alone says so
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                console=bar_console(),
            )
            self._task = self._bar.add_task("training", total=num_steps, status="building the pipeline")

    def __enter__(self) -> ProgressReporter:
        if self._bar is not None:
            self._bar.start()
            keep_log_beside_bar()
        self._logs_before = LOG.level
        LOG.setLevel(logging.INFO)
        LOG.addHandler(self._compiling)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        LOG.removeHandler(self._compiling)
        LOG.setLevel(self._logs_before)
        if self._bar is not None:
            self._bar.stop()

    def _building(self, message: str) -> None:
        """Show what the first rank builds; other ranks compile their stages at the same time."""
        if self._bar is not None:
            self._bar.update(self._task, status=message)
        else:
            self._console.print(message, highlight=False, markup=False)

    def step(self, step: int, loss: float, speed: str, bubble: float | None = None) -> None:
        """See `Reporter.step`. The last measured bubble stays."""
        self._bubble = self._bubble if bubble is None else f"  measured bubble {bubble:.1%}"
        status = f"loss {loss:.3f}  {speed}{self._bubble}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif step in (1, self._num_steps) or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"step {step}/{self._num_steps}  {status}", highlight=False, soft_wrap=True)

    def validating(self, batch: int, num_batches: int) -> None:
        """See `Reporter.validating`."""
        if self._bar is not None:
            self._bar.update(self._task, status=f"validating: batch {batch} of {num_batches}")

    def validation(self, step: int, text: str) -> None:
        """See `Reporter.validation`."""
        self.note(f"step {step}: {text}")

    def note(self, text: str) -> None:
        """See `Reporter.note`."""
        self._console.print(text, highlight=False, markup=False)


@contextmanager
def search_bar(console: Console, seconds: float) -> Iterator[Callable[[float, float], None]]:
    """Show a bar during a schedule search; nothing if the output is not a terminal.

    Yields a function for `schedule.search`'s progress: (elapsed seconds, best step time in ms).
    """
    columns = (
        TextColumn("searching for a schedule"),
        BarColumn(bar_width=None),
        TextColumn("best {task.fields[best]:.3g} ms"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("searching", total=seconds, best=float("inf"))
        yield lambda elapsed, best: bar.update(task, completed=elapsed, best=best)
