"""The values of every step: written to the run's file and sent to trackers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from autofunc.errors import FAILURES, in_brief
from autofunc.train.metrics_file import MetricsFile
from autofunc.train.output import METRICS
from autofunc.train.trackers import Tracker


class Records(AbstractContextManager["Records"]):
    """Records the values of a run's steps.

    Args:
        folder: of the run.
        after_step: the step a resumed run starts after.
        trackers: also receive values. A failing tracker is dropped and does not end the run.
        every_steps: how often trackers receive a step; they receive every validation.
        warn: called about a dropped tracker.
    """

    def __init__(
        self, folder: Path, after_step: int, trackers: Sequence[Tracker], every_steps: int, warn: Callable[[str], None]
    ) -> None:
        self._file = MetricsFile(folder / METRICS, after_step)
        self._trackers, self._every_steps, self._warn = list(trackers), every_steps, warn

    def write(self, *, step: int, **values: Any) -> None:
        """Record values of a step. None and values that JSON cannot express, such as NaN, are left out."""
        values = {name: each if _is_known(each) else None for name, each in values.items()}
        self._file.write(step=step, **values)
        if "loss" in values and step % self._every_steps:
            return
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        self._tell(lambda tracker: tracker.log(step, numbers))

    @property
    def error(self) -> OSError | None:
        """Why the file lacks lines, if it does."""
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
                self._warn(f"{tracker.name} failed and gets no more values: {in_brief(error)}. {METRICS} continues")


def _is_known(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
