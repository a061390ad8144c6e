"""What becomes of a step whose loss or gradients are not finite: the run ends, or the step is skipped, or taken anyhow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from autofunc.errors import NotFiniteError, full_message
from autofunc.pipe import Pipeline

Action = Literal["stop", "skip", "warn"]


class NonFinite:
    """Decides, alike in all processes: each knows the loss and the norm of the gradients, which are of all of them.

    Args:
        action: what the configuration wants.
        most: how many steps in a row may be skipped.
        tell: told of each, on the first rank.
    """

    def __init__(self, action: Action, most: int, tell: Callable[[str], None]) -> None:
        self._action, self._most, self._tell = action, most, tell
        self._met = 0
        self._in_a_row = 0

    def met(self, pipe: Pipeline, ran: Iterable[tuple[Any, ...]], what: str) -> bool:
        """What is to become of a step that is not finite; all processes call it.

        Where that begins is found by running the step once more, for the first of a run and for one that ends it.

        Args:
            pipe: of the run.
            ran: what each part of the step was called with.
            what: what is known.

        Returns:
            Whether the step is skipped; else it is taken.

        Raises:
            NotFiniteError: when the run ends.
        """
        self._met += 1
        self._in_a_row += 1
        ends = self._action == "stop" or (self._action == "skip" and self._in_a_row > self._most)
        if ends and self._action == "skip":
            what = f"{what}, after {self._most} steps that were skipped (max_skips)"
        if ends or self._met == 1:
            what = f"{what}{_beginning(pipe, ran)}"
        if ends:
            raise NotFiniteError(what)
        done = "skipped" if self._action == "skip" else "taken"
        self._tell(f"{what}\nthe step is {done} (nonfinite: {self._action}), the {_ordinal(self._met)} so far")
        return self._action == "skip"

    def passed(self) -> None:
        """A step was finite."""
        self._in_a_row = 0


def _beginning(pipe: Pipeline, ran: Iterable[tuple[Any, ...]]) -> str:
    """Where a step makes what is not finite, found by running it once more."""
    for given in ran:
        try:
            pipe.check_finite(*given)
        except NotFiniteError as error:
            return f"; {full_message(error)}"
    return ", but not when the step is run again: its values depend on more than its arguments"


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
