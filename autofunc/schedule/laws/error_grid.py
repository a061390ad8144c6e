"""The table of a schedule as text, with one action marked: what errors show."""

from __future__ import annotations

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Schedule

_MOST_RANKS = 12


def grid(schedule: Schedule, mark: tuple[int, int] | None = None, width: int = 78) -> str:
    """One line per rank, actions in order; `mark` is (rank, position) of the action to point at.

    Long rows show only the neighbourhood of the mark, and of many ranks only those near it.
    """
    cells = [[str(action) for action in row] for row in schedule]
    if mark is not None:
        rank, position = mark
        if position < len(cells[rank]):
            cells[rank][position] = f">>{cells[rank][position]}<<"
    lines = []
    near = range(len(cells)) if mark is None or len(cells) <= _MOST_RANKS else range(mark[0] - 3, mark[0] + 4)
    for rank, row in enumerate(cells):
        if rank not in near:
            if rank in (near[0] - 1, near[-1] + 1):
                lines.append("...")
            continue
        centre = mark[1] if mark is not None and mark[0] == rank else 0
        lines.append(f"rank {rank} | " + _window(row, centre, width - 9))
    return "\n".join(lines)


def error_at(schedule: Schedule, rank: int, position: int, reason: str) -> ScheduleError:
    """An error about one action: rank, position, action, the reason, and the grid with the action marked."""
    where = f"rank {rank}, position {position}, {schedule[rank][position]}"
    return ScheduleError(f"{where}: {reason}\n{grid(schedule, (rank, position))}")


def _window(cells: list[str], centre: int, width: int) -> str:
    """The cells around `centre` that fit into `width` characters, with dots where some are left out."""
    if len(" ".join(cells)) <= width:
        return " ".join(cells)
    low, high = centre, min(centre + 1, len(cells))
    while True:
        grown = [(low - 1, high)] if low > 0 else []
        grown += [(low, high + 1)] if high < len(cells) else []
        fitting = [span for span in grown if len(" ".join(cells[slice(*span)])) <= width - 8]
        if not fitting:
            break
        low, high = min(fitting, key=lambda span: abs(span[0] + span[1] - 2 * centre - 1))
    return ("... " if low > 0 else "") + " ".join(cells[low:high]) + (" ..." if high < len(cells) else "")
