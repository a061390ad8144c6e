"""Schedules and timelines display in notebooks as the picture that `draw` would write.

Notebooks ask an object for `_repr_svg_`. The methods are set here, because pictures import schedules and not the reverse.
"""

from __future__ import annotations

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.pictures.draw_svg import to_svg
from autofunc.schedule.timing.simulation import simulate
from autofunc.schedule.timing.timeline import Timeline

_MOST_ACTIONS = 20_000  # in one picture, which is then 5 MB large


def _of_timeline(timeline: Timeline) -> str | None:
    """Draw a timeline; None, for which notebooks show the repr, if the picture would be too large."""
    actions = sum(int((row.table[:, 1] <= Kind.W).sum()) for row in timeline.schedule)
    return to_svg([timeline]) if actions <= _MOST_ACTIONS else None


def _of_schedule(schedule: Schedule) -> str | None:
    """Draw a schedule; None also if it cannot run, such as one that is still being written."""
    try:
        return _of_timeline(simulate(schedule))
    except ScheduleError:
        return None


def show_in_notebooks() -> None:
    """Register the pictures with the classes that notebooks ask."""
    Timeline._repr_svg_ = _of_timeline  # type: ignore[attr-defined]
    Schedule._repr_svg_ = _of_schedule  # type: ignore[attr-defined]
