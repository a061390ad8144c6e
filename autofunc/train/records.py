"""What is kept of every step: in the run's file, and wherever else it is followed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from autofunc.errors import FAILURES, in_brief
from autofunc.train.metrics import MetricsFile
from autofunc.train.output import METRICS
from autofunc.train.trackers import Tracker


class Records(AbstractContextManager["Records"]):
    """Keeps what a run tells of its steps, until the run ends.

    Args:
        folder: of the run.
        after_step: of a run that goes on.
        trackers: who else is told. One that fails is told no more, and ends no run.
        every_steps: how often they are; they get every validation.
        warn: told of one that has failed.
    """

    def __init__(
        self, folder: Path, after_step: int, trackers: Sequence[Tracker], every_steps: int, warn: Callable[[str], None]
    ) -> None:
        self._file = MetricsFile(folder / METRICS, after_step)
        self._trackers, self._every_steps, self._warn = list(trackers), every_steps, warn

    def write(self, *, step: int, **values: Any) -> None:
        """Keep some values of a step. None is none, and so is what is no number, which JSON cannot say."""
        values = {name: each if _is_known(each) else None for name, each in values.items()}
        self._file.write(step=step, **values)
        if "loss" in values and step % self._every_steps:
            return
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        self._tell(lambda tracker: tracker.log(step, numbers))

    @property
    def error(self) -> OSError | None:
        """Why the file lacks lines."""
        return self._file.error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._tell(lambda tracker: tracker.close(failed=error is not None))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except FAILURES as error:
                self._trackers.remove(tracker)
                self._warn(f"{tracker.name} is told no more: {in_brief(error)}. {METRICS} goes on")


def _is_known(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
