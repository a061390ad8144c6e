"""Steps whose loss or gradients are not finite: end the run, skip the step, or take it anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from autofunc.errors import NotFiniteError, full_message
from autofunc.pipe import Pipeline

Action = Literal["stop", "skip", "warn"]


class NonFinite:
    """Decides what happens. Every process decides alike, because loss and gradient norm are global.

    Args:
        action: as configured.
        most: number of consecutive steps that may be skipped.
        tell: called with each message, on the first rank.
    """

    def __init__(self, action: Action, most: int, tell: Callable[[str], None]) -> None:
        self._action, self._most, self._show = action, most, tell
        self._met = 0
        self._in_a_row = 0

    def handle(self, pipe: Pipeline, ran: Iterable[tuple[Any, ...]], what: str) -> bool:
        """Decide about a step that is not finite; all processes call it.

        The first such step, and one that ends the run, is rerun to find where the values come from.

        Args:
            pipe: of the run.
            ran: the arguments of each part of the step.
            what: description of what was found.

        Returns:
            True to skip the step, False to take it.

        Raises:
            NotFiniteError: to end the run.
        """
        self._met += 1
        self._in_a_row += 1
        ends = self._action == "stop" or (self._action == "skip" and self._in_a_row > self._most)
        if ends and self._action == "skip":
            what = f"{what}, after {self._most} skipped steps (max_skips)"
        if ends or self._met == 1:
            what = f"{what}{_beginning(pipe, ran)}"
        if ends:
            raise NotFiniteError(what)
        done = "skipped" if self._action == "skip" else "taken"
        self._show(f"{what}\nthe step is {done} (nonfinite: {self._action}), the {_ordinal(self._met)} so far")
        return self._action == "skip"

    def passed(self) -> None:
        """Note a finite step."""
        self._in_a_row = 0


def _beginning(pipe: Pipeline, ran: Iterable[tuple[Any, ...]]) -> str:
    """Run the step once more and describe where values first stop being finite."""
    for given in ran:
        try:
            pipe.check_finite(*given)
        except NotFiniteError as error:
            return f"; {full_message(error)}"
    return ", but not when the step is run again: its values depend on more than its arguments"


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
