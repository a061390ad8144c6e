"""The family of errors, and helpers for their messages.

Every error that a user can cause is an `AutofuncError`: it names what was given, what was expected, and the nearest
thing that would work. Each subclass also derives from the built-in that a Python programmer would catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from autofunc.shown import beginning, printable, shown
from autofunc.users_lines import in_notebook


class AutofuncError(Exception):
    """Base of every error raised on purpose by autofunc. Its message is printable, whatever names it contains."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_lines(each) if isinstance(each, str) else each for each in args))

    def _render_traceback_(self) -> list[str]:
        """Return what IPython, which calls this method, shows in a notebook: the message, and the user's lines."""
        return in_notebook(self, full_message(self))


class ConfigError(AutofuncError, ValueError):
    """A configuration file or an override asks for something impossible."""


class ModelError(AutofuncError, ValueError):
    """A model, its parameters or its ties do not fit together."""


class SplitError(AutofuncError, ValueError):
    """Split points that do not name legal places to cut the model."""


class ScheduleError(AutofuncError, ValueError):
    """A schedule that is unknown, cannot be built for these numbers, or breaks a law of schedules."""


class BatchError(AutofuncError, ValueError):
    """A batch that cannot be cut into microbatches, or a loss that violates its contract."""


class MeshError(AutofuncError, ValueError):
    """A device mesh that does not match the processes, the schedule or the stages."""


class DataError(AutofuncError, ValueError):
    """A dataset that is missing, empty or has a different schema."""


class CheckpointError(AutofuncError, ValueError):
    """A checkpoint that is missing, incomplete or damaged, or does not fit what it is read into."""


class PipelineRunError(AutofuncError, RuntimeError):
    """A run of a pipeline failed. The message of a failed action names it and shows the grid with it marked.

    Args:
        message: what went wrong.
        rank: the failing pp rank. None, here and below, if unknown or not applicable.
        step: number of the pipeline's step, from 1.
        action: the failing action as text, such as "1F2".
        stage: of the action.
        microbatch: of the action; actions that gather or release parameters have none.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        step: int | None = None,
        action: str | None = None,
        stage: int | None = None,
        microbatch: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank, self.step, self.action, self.stage, self.microbatch = rank, step, action, stage, microbatch


class NotFiniteError(PipelineRunError):
    """A loss, value, gradient or parameter is NaN or infinite; the message names its origin."""


class PeerLostError(PipelineRunError):
    """A rank waited for a peer that is gone or too late. This is a consequence; the cause is on the peer."""


class HangError(PipelineRunError):
    """No rank makes progress; the message tells what each rank does, and which is late."""


def full_message(error: BaseException) -> str:
    """Return an error's message and its notes, each on a line; `str(error)` leaves notes out."""
    return "\n".join(_lines(str(each)) for each in [error, *getattr(error, "__notes__", ())])


FAILURES = (Exception, SystemExit)
"""Exceptions that foreign code may raise: all but interrupts. Uncaught, SystemExit would end the process silently."""


def in_brief(error: BaseException) -> str:
    """Describe an error of foreign code by its type and message, shortened if long."""
    return f"{type(error).__name__}: {beginning(full_message(error))}"


def _lines(text: str) -> str:
    return printable(text, keep="\n\t")


def some_of(names: Iterable[object], most: int = 3) -> str:
    """List the first few names, for messages."""
    listed = list(names)
    return ", ".join(map(shown, listed[:most])) + (f" and {len(listed) - most:,} more" if len(listed) > most else "")


def divisors(number: int, most: int | None = None) -> list[str]:
    """Return the divisors of a number, as text, up to `most`: the sizes that work if one does not divide it."""
    return [str(size) for size in range(1, min(number, most or number) + 1) if number % size == 0]


def one_of(given: object, known: Iterable[object]) -> str:
    """Return half a sentence that suggests the nearest of `known` for `given`, and lists the known names.

    >>> one_of("1f1", ["gpipe", "1f1b"])
    'did you mean 1f1b? Known: gpipe, 1f1b'
    """
    names = [shown(name) for name in known]
    near = difflib.get_close_matches(shown(given), names, n=3, cutoff=0.5)
    listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    if near:
        return f"did you mean {' or '.join(near)}? Known: {listed}"
    return f"known: {listed}" if names else "none are known"
