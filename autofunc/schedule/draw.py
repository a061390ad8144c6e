"""Draw a schedule or a timeline as text: one line per rank, time from left to right."""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Action, Kind, Schedule
from autofunc.schedule.simulate import simulate
from autofunc.schedule.timeline import Timeline

_COLOURS = {Kind.F: "30;44", Kind.B: "30;42", Kind.I: "30;46", Kind.W: "30;43"}
_LEGEND = {
    Kind.F: "0 forward",
    Kind.B: "[0 ] backward",
    Kind.I: "i0 input gradient",
    Kind.W: "w0 weight gradient",
}
_IDLE = "."


def draw(what: Schedule | Timeline, width: int = 80, colour: bool = False) -> str:
    """Draw as text, proportional to time; time that does not fit into one line goes on in the next block.

    Args:
        what: a schedule (drawn with equal costs for F, I and W) or a timeline.
        width: columns to fit into.
        colour: paint with ANSI colours.
    """
    timeline = what if isinstance(what, Timeline) else simulate(what)
    schedule = timeline.schedule
    label_width = max(len(str(schedule.num_microbatches - 1)) + 1, 2)
    scale = label_width / _shortest(timeline)
    columns = max(round(timeline.makespan * scale), 1)
    prefix = max(len(f"rank {schedule.num_ranks - 1}"), len("rank 0"))
    block = max(width - prefix - 3, label_width)

    origin = min(float(times.min()) for times in timeline.start if times.size)
    canvases = [_paint(timeline, rank, columns, scale, origin) for rank in range(schedule.num_ranks)]
    lines = []
    for begin in range(0, columns, block):
        for rank, (text, kinds) in enumerate(canvases):
            cells = _coloured(text[begin : begin + block], kinds[begin : begin + block], colour)
            lines.append(f"{f'rank {rank}':<{prefix}} | {cells}")
        if begin + block < columns:
            lines.append("")
    present = [kind for kind in _LEGEND if any(bool((row.table[:, 1] == kind).any()) for row in schedule)]
    legend = "   ".join([*(_LEGEND[kind] for kind in present), f"{_IDLE} idle"])
    return "\n".join([*lines, legend])


def _shortest(timeline: Timeline) -> float:
    durations = np.concatenate([end - start for start, end in zip(timeline.start, timeline.end, strict=True)])
    return float(durations[durations > 0].min())


def _paint(timeline: Timeline, rank: int, columns: int, scale: float, origin: float) -> tuple[list[str], list[Kind | None]]:
    """The characters of one rank's line, and the kind of action under each."""
    text = [_IDLE] * columns
    kinds: list[Kind | None] = [None] * columns
    for action, start, end in zip(timeline.schedule[rank], timeline.start[rank], timeline.end[rank], strict=True):
        begin, stop = round((start - origin) * scale), round((end - origin) * scale)
        if action.kind.is_compute and stop > begin:
            text[begin:stop] = _label(action, stop - begin)
            kinds[begin:stop] = [action.kind] * (stop - begin)
    return text, kinds


def _label(action: Action, width: int) -> str:
    number = str(action.microbatch)
    if action.kind is Kind.B and width >= len(number) + 2:
        return f"[{number:<{width - 2}}]"
    marker = {Kind.F: "", Kind.B: "b", Kind.I: "i", Kind.W: "w"}[action.kind]
    return f"{marker + number:<{width}}"[:width]


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
