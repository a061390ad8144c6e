"""The table of a schedule as text, with one action marked, as errors show it."""

from __future__ import annotations

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Row, Schedule

_MOST_RANKS = 12
_LEAST = 4
"""Characters of an action and the space after it, such as "0F0 "."""


def grid(schedule: Schedule, mark: tuple[int, int] | None = None, width: int = 78) -> str:
    """Write one line per rank, actions in order; `mark` is the (rank, position) of the action to point at.

    Long rows are cut to the neighbourhood of the mark, and many ranks to those near it, or to the first.
    """
    ranks = range(schedule.num_ranks)
    centre = 0 if mark is None else mark[0]
    near = ranks if len(ranks) <= _MOST_RANKS else ranks[max(centre - 3, 0) : centre + 4]
    lines = ["..."] if near[0] > 0 else []
    for rank in near:
        position = mark[1] if mark is not None and mark[0] == rank else None
        lines.append(f"rank {rank} | " + _window(schedule[rank], position, width - 9))
    return "\n".join([*lines, "..."] if near[-1] < ranks[-1] else lines)


def error_at(schedule: Schedule, rank: int, position: int, reason: str) -> ScheduleError:
    """Make the error about one action: rank, position, action, reason, and the grid with the action marked."""
    where = f"rank {rank}, position {position}, {schedule[rank][position]}"
    return ScheduleError(f"{where}: {reason}\n{grid(schedule, (rank, position))}")


def _window(row: Row, mark: int | None, width: int) -> str:
    """Write the actions around `mark` that fit into `width` characters, with dots where some are left out."""
    centre = mark or 0
    first = max(centre - width // _LEAST, 0)
    cells = [str(action) for action in row[first : centre + width // _LEAST + 1]]
    if mark is not None and mark < len(row):
        cells[mark - first] = f">>{cells[mark - first]}<<"
    if len(cells) == len(row) and len(" ".join(cells)) <= width:
        return " ".join(cells)
    low, high = centre - first, min(centre - first + 1, len(cells))
    while True:
        grown = [(low - 1, high)] if low > 0 else []
        grown += [(low, high + 1)] if high < len(cells) else []
        fitting = [span for span in grown if len(" ".join(cells[slice(*span)])) <= width - 8]
        if not fitting:
            break
        low, high = min(fitting, key=lambda span: abs(span[0] + span[1] - 2 * (centre - first) - 1))
    before, after = "... " * (first + low > 0), " ..." * (first + high < len(row))
    return before + " ".join(cells[low:high]) + after
