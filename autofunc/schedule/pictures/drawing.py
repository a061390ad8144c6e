"""Draw schedules and timelines: text for a terminal, or a file in the format its suffix names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.files.text_file import write_bytes, write_text
from autofunc.schedule.ir import Schedule
from autofunc.schedule.pictures.draw_html import to_html
from autofunc.schedule.pictures.draw_png import to_png
from autofunc.schedule.pictures.draw_svg import to_svg
from autofunc.schedule.pictures.draw_text import to_picture
from autofunc.schedule.pictures.draw_trace import to_trace
from autofunc.schedule.pictures.notebook import show_in_notebooks
from autofunc.schedule.timing.simulation import simulate
from autofunc.schedule.timing.timeline import Timeline

_WRITERS: dict[str, Callable[[Sequence[Timeline]], str]] = {".svg": to_svg, ".html": to_html, ".json": to_trace}

PNG = ".png"

Drawable = Schedule | Timeline

show_in_notebooks()


def draw(
    what: Drawable | Sequence[Drawable],
    path: str | os.PathLike[str] | None = None,
    *,
    width: int = 80,
    colour: bool = False,
) -> str:
    """Draw a schedule (with equal costs for F, I and W) or a timeline, or several, stacked.

    Args:
        what: timelines and schedules. In a schedule every F, `I` and W takes one unit of time.
        path: file to write: `.svg` or `.png` for a picture, `.html` for a page with zoom and tooltips, `.json` for a trace
            in Perfetto or chrome://tracing (1 unit of time is 1 ms there). Without a path, only the text is returned.
        width: of the text, in columns.
        colour: paint the text with ANSI colours.

    Returns:
        The text, or the content of the file; for `.png`, the same picture as SVG.

    Raises:
        ScheduleError: for an unknown suffix, or nothing to draw.

    Example:
        >>> from autofunc import schedule
        >>> print(draw(schedule.build("1f1b", num_ranks=2, num_microbatches=2)))
        rank 0 | 0 1 ..[0 ]..[1 ]
        rank 1 | ..0 [0 ]1 [1 ]..
        0 forward   [0 ] backward   . idle
    """
    drawables = [what] if isinstance(what, (Schedule, Timeline)) else list(what)
    if not drawables:
        raise ScheduleError("nothing to draw: no schedule or timeline was given")
    timelines = [each if isinstance(each, Timeline) else simulate(each) for each in drawables]
    if path is None:
        return "\n\n".join(to_picture(timeline, width, colour) for timeline in timelines)
    suffix = Path(path).suffix.lower()
    if suffix == PNG:
        write_bytes(path, to_png(timelines))
        return to_svg(timelines)
    if suffix not in _WRITERS:
        known = one_of(suffix, [*_WRITERS, PNG])
        raise ScheduleError(f"cannot draw {os.fspath(path)!r}: unknown suffix {suffix!r}; {known}")
    text = _WRITERS[suffix](timelines)
    write_text(path, text)
    return text
