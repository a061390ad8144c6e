"""The log of each process of a run; the first process also prints to the console."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

from autofunc.errors import FAILURES
from autofunc.progress_bar import LiveConsole
from autofunc.train.output import LOGS
from autofunc.train.role import restarts

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")  # colours and cursor movements
_kept: list[Log] = []  # this process's open logs


def log_of(folder: Path, rank: int) -> Path:
    """Return the log file of a rank, given the run's folder."""
    return folder / LOGS / f"rank_{rank}.log"


class Log(io.TextIOBase):
    """An open log. A full disk does not end the run; `error` tells why lines are missing.

    Args:
        path: of the file; new text is appended.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.error: OSError | None = None
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def write(self, text: str) -> int:
        """Write the text, as far as possible."""
        if self.error is None:
            try:
                self._file.write(text)
            except OSError as error:
                self.error = error
        return len(text)

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()  # flushes, which may fail
        except OSError as error:
            self.error = self.error or error

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The file's encoding."""
        return self._file.encoding


class Teed(io.TextIOBase):
    """A text stream to the console and a log.

    Args:
        console: the original stream.
        log: gets all text, without control sequences.
        quiet: print nothing to the console.
    """

    def __init__(self, console: TextIO, log: Log, quiet: bool = False) -> None:
        self.console, self.log, self.quiet = console, log, quiet

    def write(self, text: str) -> int:
        """Write to console and log."""
        if not self.quiet:
            self.console.write(text)
        self.log.write(_CONTROL.sub("", text))
        return len(text)

    def flush(self) -> None:
        """Flush both."""
        self.console.flush()
        self.log.flush()

    def isatty(self) -> bool:
        """Return whether the console is a terminal."""
        return not self.quiet and self.console.isatty()

    def fileno(self) -> int:
        """Return the console's descriptor; output written through it bypasses the log."""
        return self.console.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The console's encoding."""
        return self.console.encoding


@contextmanager
def kept_log(folder: Path, rank: int, *, quiet: bool = False) -> Iterator[None]:
    """Copy stdout, stderr and the final traceback of this process to its log.

    The first rank also prints to the console; all other ranks print nothing, so messages common to all ranks appear once.
    Logs of earlier starts are kept and appended to.

    Args:
        folder: of the run.
        rank: of this process.
        quiet: the first rank prints nothing either, except through `show_last`.
    """
    path = log_of(folder, rank)
    with closing(Log(path)) as log:
        again = f", restart {restarts()}" if restarts() else ""
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}: rank {rank}, process {os.getpid()}{again}\n")
        _kept.append(log)
        try:
            with _teed(log, quiet) if rank == 0 else _sent_to(log):
                yield
        except FAILURES:
            log.write(traceback.format_exc())
            raise
        finally:
            _kept.remove(log)
    if log.error is not None:
        sys.stdout.write(f"{path} lacks lines: {log.error}\n")


@contextmanager
def named_log(folder: Path, rank: int, *, quiet: bool = False) -> Iterator[None]:
    """Like `kept_log`, for a process that reports its own errors: they name the log."""
    try:
        with kept_log(folder, rank, quiet=quiet):
            yield
    except FAILURES as error:
        error.add_note(f"log: {log_of(folder, rank)}")
        raise


@contextmanager
def log_alone() -> Iterator[None]:
    """Print to the log only, for text that another process has shown."""
    streams = [each for each in (sys.stdout, sys.stderr) if isinstance(each, Teed)]
    before = [each.quiet for each in streams]
    for each in streams:
        each.quiet = True
    try:
        yield
    finally:
        for each, was in zip(streams, before, strict=True):
            each.quiet = was


def write_log(text: str) -> None:
    """Write to this process's log only, if it has one."""
    for log in _kept[-1:]:
        log.write(text)


def show_last(text: str) -> None:
    """Show a run's closing text, even in a quiet run."""
    sys.stdout.write(f"{text}\n")
    if isinstance(sys.stdout, Teed) and sys.stdout.quiet:
        sys.stdout.console.write(f"{text}\n")
    sys.stdout.flush()


def line_console() -> Console:
    """Return a console that prints to whatever `sys.stdout` is at that moment: rich replaces it while it draws a bar."""
    return Console(file=cast(TextIO, _Stdout()))


def bar_console() -> LiveConsole:
    """Return the console for animated output, which bypasses the log."""
    stream = sys.stdout
    return LiveConsole(file=stream.console if isinstance(stream, Teed) else stream, quiet=_is_quiet())


def keep_log_beside_bar() -> None:
    """Keep logging while rich draws a bar: rich temporarily replaces our streams with its own."""
    for name in ("stdout", "stderr"):
        drawn = getattr(sys, name)
        ours = getattr(drawn, "rich_proxied_file", None)
        if isinstance(ours, Teed):
            setattr(sys, name, Teed(drawn, ours.log))


class _Stdout(io.TextIOBase):
    """Forwards to the current `sys.stdout`."""

    def write(self, text: str) -> int:
        return sys.stdout.write(text)

    def flush(self) -> None:
        sys.stdout.flush()

    def isatty(self) -> bool:
        return sys.stdout.isatty()

    def fileno(self) -> int:
        return sys.stdout.fileno()


def _is_quiet() -> bool:
    return isinstance(sys.stdout, Teed) and sys.stdout.quiet


@contextmanager
def _teed(log: Log, quiet: bool) -> Iterator[None]:
    """Send Python's streams to both the console and the log, including handlers that hold the original streams."""
    before = sys.stdout, sys.stderr
    out, err = (Teed(each, log, quiet) for each in before)
    handlers = [each for each in _stream_handlers() if each.stream is before[1]]
    sys.stdout, sys.stderr = out, err
    for handler in handlers:
        handler.setStream(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for handler in handlers:
            handler.setStream(before[1])


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    """Return the stream handlers of all loggers: libraries create theirs on import."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.getLogger().manager.loggerDict))]
    return [each for logger in loggers for each in logger.handlers if isinstance(each, logging.StreamHandler)]


@contextmanager
def _sent_to(log: Log) -> Iterator[None]:
    """Send all output of this process to a file, including output not written by Python."""
    before, copies = (sys.stdout, sys.stderr), [os.dup(number) for number in (1, 2)]
    for stream in before:
        stream.flush()
    sys.stdout = sys.stderr = log
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        log.flush()
        sys.stdout, sys.stderr = before
        for number, copy in zip((1, 2), copies, strict=True):
            os.dup2(copy, number)
            os.close(copy)
