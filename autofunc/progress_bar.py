"""Progress bars for work over two seconds, shown by the first process only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from autofunc.shown import literal, shown


class LiveConsole(Console):
    """A console for bars and spinners, which move on terminals only.

    `FORCE_COLOR` asks for colours. Notebooks set it for commands, whose output is a pipe.
    """

    @property
    def is_terminal(self) -> bool:
        """True if what is drawn can be drawn over."""
        return super().is_terminal and self.file.isatty()


CONSOLE = LiveConsole(stderr=True)
"""The live display shared by all bars: bars and lines of one console stack."""

_SECONDS_UNSEEN = 2.0
_SECONDS_BETWEEN_LINES = 10.0


def _is_shown() -> bool:
    """Return whether this process is the first, or the only one; known before a process group exists."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line to stderr, from the first process."""
    if _is_shown():
        CONSOLE.print(literal(text), soft_wrap=True)


def note(text: str) -> None:
    """Print a note to stderr, from the first process."""
    say(f"note: {text}")


@contextmanager
def counting(what: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show progress: a bar on a terminal, occasional lines in a log.

    Yields a function to call with the amount of finished work.

    Args:
        what: is being done, such as "tokenising data.jsonl".
        unit: of the count, such as "rows".
        total: count at the end; None if unknown.
    """
    began = last_line = time.monotonic()
    done = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=CONSOLE, transient=True, disable=not _is_shown() or not CONSOLE.is_terminal) as bar:
        task = bar.add_task(shown(what, 60), total=total, visible=False, count="")

        def advance(more: int) -> None:
            nonlocal done, last_line
            done += more
            now = time.monotonic()
            if now - began < _SECONDS_UNSEEN:
                return
            count = f"{done:,}{f' of {total:,}' if total is not None else ''} {unit}"
            bar.update(task, completed=done, visible=True, count=count)
            if bar.disable and now - last_line > (_SECONDS_BETWEEN_LINES if last_line != began else _SECONDS_UNSEEN):
                last_line = now
                say(f"{what}: {count}")

        yield advance
