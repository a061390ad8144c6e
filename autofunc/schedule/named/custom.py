"""A user's own schedule, from a function or a file, to be used like a named one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from autofunc.errors import ScheduleError
from autofunc.schedule.files.schedule_file import read_file
from autofunc.schedule.ir import Action, Schedule
from autofunc.schedule.laws.validator import validate
from autofunc.schedule.text import from_actions, from_text, parse_cell
from autofunc.shown import quoted, shown

Function = Callable[..., Any]
"""Makes a schedule from num_ranks, num_microbatches and, if it names it, stages_per_rank.

`schedule_of_function` lists what it may return.
"""


def schedule_of_file(path: str | Path, num_ranks: int, num_microbatches: int, stages_per_rank: int | None) -> Schedule:
    """Read a schedule from a file and check it.

    Raises:
        ScheduleError: if it breaks a law, or does not have the numbers asked for.
    """
    return _checked(read_file(path), shown(path), num_ranks, num_microbatches, stages_per_rank)


def schedule_of_function(
    function: Function, num_ranks: int, num_microbatches: int, stages_per_rank: int | None
) -> Schedule:
    """Call a function of integers and check the schedule it makes.

    It may return a `Schedule`, a table as text, or for each rank a list of actions or of their text.

    Raises:
        ScheduleError: if it breaks a law, or does not have the numbers asked for.
    """
    name = getattr(function, "__name__", type(function).__name__)
    numbers: dict[str, int] = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    signature = inspect.signature(function)
    if stages_per_rank is not None and "stages_per_rank" in signature.parameters:
        numbers["stages_per_rank"] = stages_per_rank
    try:
        signature.bind(**numbers)
    except TypeError as error:
        raise ScheduleError(
            f"function {name}{signature} cannot make a schedule: {error}; it is called with num_ranks, num_microbatches, "
            "and stages_per_rank if it names it"
        ) from error
    made = function(**numbers)
    if isinstance(made, str):
        made = from_text(made, name)
    elif not isinstance(made, Schedule):
        if not isinstance(made, (list, tuple)):
            raise ScheduleError(
                f"function {name} returned {type(made).__name__}; expected a Schedule, a table as text, or a list of "
                "actions for each rank"
            )
        made = from_actions([_row(row, name) for row in made], name)
    return _checked(made, f"function {name}", num_ranks, num_microbatches, stages_per_rank)


def _row(row: object, name: str) -> list[Action]:
    cells = row.replace(",", " ").split() if isinstance(row, str) else row
    if not isinstance(cells, Iterable):
        raise ScheduleError(f"function {name}: {quoted(row)} is not a list of actions")
    return [action for cell in cells for action in _actions(cell, name)]


def _actions(cell: object, name: str) -> list[Action]:
    if isinstance(cell, Action):
        return [cell]
    if isinstance(cell, str):
        return parse_cell(cell)
    raise ScheduleError(f"function {name}: {quoted(cell)} is not an action; expected an Action or its text, such as '2F0'")


def _checked(
    schedule: Schedule, source: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None
) -> Schedule:
    found = {"ranks": schedule.num_ranks, "microbatches": schedule.num_microbatches}
    asked = {"ranks": num_ranks, "microbatches": num_microbatches}
    if stages_per_rank is not None:
        found["stages"], asked["stages"] = schedule.num_stages, stages_per_rank * num_ranks
    if found != asked:
        told = [", ".join(f"{count} {what}" for what, count in numbers.items()) for numbers in (found, asked)]
        raise ScheduleError(f"{source}: the schedule is for {told[0]}; asked for {told[1]}")
    try:
        validate(schedule)
    except ScheduleError as error:
        raise ScheduleError(f"{source}: {error}") from error
    return schedule.compute_form()
