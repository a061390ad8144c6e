"""Draw a timeline as text: one line per rank, time from left to right."""

from __future__ import annotations

import math

import numpy as np

from autofunc.schedule.ir import Action, Kind
from autofunc.schedule.pictures.blocks import letters_of
from autofunc.schedule.timing.timeline import Timeline

_COLOURS = {Kind.F: "30;44", Kind.B: "30;42", Kind.I: "30;46", Kind.W: "30;43"}
_LEGEND = {
    Kind.F: "0 forward",
    Kind.B: "[0 ] backward",
    Kind.I: "i0 input gradient",
    Kind.W: "w0 weight gradient",
}
_IDLE = "."
_MOST_COLUMNS = 4000  # if actions differ much in length, short ones lose their labels


def to_picture(timeline: Timeline, width: int = 80, colour: bool = False) -> str:
    """Draw as text, proportional to time; time that does not fit into one line continues in the next block.

    If ranks have several stages, a letter after the microbatch names the stage: a is the rank's first.

    Args:
        timeline: what to draw.
        width: of a line, in columns.
        colour: paint with ANSI colours.
    """
    schedule = timeline.schedule
    letters = letters_of(schedule)
    label_width = max(len(str(schedule.num_microbatches - 1)) + 1, 2) + 2 * bool(letters[0])
    scale = min(label_width / _shortest(timeline), _MOST_COLUMNS / timeline.makespan)
    columns = max(round(timeline.makespan * scale), 1)
    prefix = max(len(f"rank {schedule.num_ranks - 1}"), len("rank 0"))
    block = max(width - prefix - 3, label_width)

    canvases = [_paint(timeline, letters, rank, columns, scale) for rank in range(schedule.num_ranks)]
    lines = []
    for begin in range(0, columns, block):
        for rank, (text, kinds) in enumerate(canvases):
            cells = _coloured(text[begin : begin + block], kinds[begin : begin + block], colour)
            lines.append(f"{f'rank {rank}':<{prefix}} | {cells}")
        if begin + block < columns:
            lines.append("")
    present = [kind for kind in _LEGEND if any(bool((row.table[:, 1] == kind).any()) for row in schedule)]
    entries = [*(_LEGEND[kind] for kind in present), f"{_IDLE} idle", *(["a, b: stage of the rank"] if letters[0] else [])]
    return "\n".join([*lines, *_wrapped(entries, width)])


def _wrapped(entries: list[str], width: int) -> list[str]:
    """Wrap the legend's entries into lines of at most `width` columns."""
    lines = [entries[0]]
    for entry in entries[1:]:
        if len(lines[-1]) + 3 + len(entry) <= width:
            lines[-1] += "   " + entry
        else:
            lines.append(entry)
    return lines


def _shortest(timeline: Timeline) -> float:
    durations = np.concatenate([end - start for start, end in zip(timeline.start, timeline.end, strict=True)])
    return float(durations[durations > 0].min())


def _paint(
    timeline: Timeline, letters: dict[int, str], rank: int, columns: int, scale: float
) -> tuple[list[str], list[Kind | None]]:
    """Return the characters of one rank's line, and the kind of action under each."""
    text = [_IDLE] * columns
    kinds: list[Kind | None] = [None] * columns
    for action, start, end in zip(timeline.schedule[rank], timeline.start[rank], timeline.end[rank], strict=True):
        begin, stop = (math.floor((time - timeline.origin) * scale + 0.5) for time in (start, end))
        stop = min(stop, columns)
        if action.kind.is_compute and stop > begin:
            text[begin:stop] = _label(action, letters[action.stage], stop - begin)
            kinds[begin:stop] = [action.kind] * (stop - begin)
    return text, kinds


def _label(action: Action, letter: str, width: int) -> str:
    number = f"{action.microbatch}{letter}"
    if action.kind is Kind.B and width >= len(number) + 2:
        return f"[{number:<{width - 2}}]"
    marker = {Kind.F: "", Kind.B: "b", Kind.I: "i", Kind.W: "w"}[action.kind]
    label = marker + number
    return f"{label:<{width}}" if len(label) <= width else (marker or "f") * width  # never cut a number


def _coloured(text: list[str], kinds: list[Kind | None], colour: bool) -> str:
    if not colour:
        return "".join(text)
    painted = ""
    for position, (character, kind) in enumerate(zip(text, kinds, strict=True)):
        code = _COLOURS.get(kind) if kind is not None else None
        previous = kinds[position - 1] if position else None
        if kind is not previous or position == 0:
            painted += "\x1b[0m" if previous is not None else ""
            painted += f"\x1b[{code}m" if code else ""
        painted += character
    return painted + ("\x1b[0m" if kinds and kinds[-1] is not None else "")
