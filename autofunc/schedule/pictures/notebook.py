"""Schedules and timelines show themselves in notebooks, as the picture that `draw` would write.

Notebooks ask an object for `_repr_svg_`. The methods are set here: pictures know schedules, and not the other way round.
"""

from __future__ import annotations

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.pictures.draw_svg import to_svg
from autofunc.schedule.timing.simulation import simulate
from autofunc.schedule.timing.timeline import Timeline

_MOST_ACTIONS = 20_000  # of a picture: five MB


def _of_timeline(timeline: Timeline) -> str | None:
    """None, and with that the text that `print` shows, where a picture would be too large."""
    actions = sum(int((row.table[:, 1] <= Kind.W).sum()) for row in timeline.schedule)
    return to_svg([timeline]) if actions <= _MOST_ACTIONS else None


def _of_schedule(schedule: Schedule) -> str | None:
    """None also for a schedule that cannot run, such as one that is being written."""
    try:
        return _of_timeline(simulate(schedule))
    except ScheduleError:
        return None


def show_in_notebooks() -> None:
    """Let notebooks find the pictures."""
    Timeline._repr_svg_ = _of_timeline  # type: ignore[attr-defined]
    Schedule._repr_svg_ = _of_schedule  # type: ignore[attr-defined]
