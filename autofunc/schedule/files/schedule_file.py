"""Schedules as files: torch's CSV, and our own JSON with a version.

The CSV is the one `torch.distributed.pipelining` loads and dumps (`_PipelineScheduleRuntime._load_csv`, formats
`compute_only` and `compute_comms`): a line per rank, a cell per action, empty cells where a rank idles. The actions tell
which of the two a table is. Sends between stages that are not neighbours have no form in torch; ours,
`0SEND_F3>2`, can be read back here only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autofunc.errors import ScheduleError, one_of
from autofunc.foreign_file import StrPath
from autofunc.schedule.files.text_file import read_json, read_text, write_text
from autofunc.schedule.ir import Action, Row, Schedule, as_table
from autofunc.schedule.limits import MOST_NAME, check_sizes
from autofunc.schedule.text import cells, from_text, parse_cell, to_text
from autofunc.shown import quoted, shown

FORMAT, VERSION = "autofunc.schedule", 1
SUFFIXES = (".csv", ".txt", ".json")


def to_csv(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule, in compute form or lowered, as torch's CSV."""
    write_text(path, to_text(schedule))


def from_csv(path: StrPath) -> Schedule:
    """Read torch's CSV, in either form; the file's name becomes the schedule's.

    Raises:
        ScheduleError: if the file does not exist, a cell is not an action (naming line and column), or a stage has no
            forward.
    """
    text = read_text(path, SUFFIXES).replace('"', "")
    try:
        return from_text(text, Path(path).stem)
    except ScheduleError as error:
        raise ScheduleError(f"{shown(path)}: {error}") from error


def to_json(schedule: Schedule, path: StrPath) -> None:
    """Write everything a schedule holds, as JSON."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": schedule.name,
        "num_microbatches": schedule.num_microbatches,
        "placement": list(schedule.placement),
        "rows": [" ".join(cells(row)) for row in schedule],
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def from_json(path: StrPath) -> Schedule:
    """Read what `to_json` wrote.

    Raises:
        ScheduleError: if the file does not exist, or has a different format or version.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ScheduleError(f'{shown(path)} is not a schedule: expected "format": "{FORMAT}"')
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ScheduleError(f"{shown(path)} has version {quoted(version)}; this release reads version {VERSION}")
    try:
        return _from_document(document)
    except ScheduleError as error:
        raise ScheduleError(f"{shown(path)}: {error}") from error


def _from_document(document: dict[str, Any]) -> Schedule:
    kinds = {"name": str, "num_microbatches": int, "placement": list, "rows": list}
    missing = [field for field in kinds if field not in document]
    if missing:
        raise ScheduleError(f"it lacks {', '.join(missing)}; a schedule has {', '.join(kinds)}")
    name, num_microbatches, placement, rows = (document[field] for field in kinds)
    for field, kind in kinds.items():
        if type(document[field]) is not kind:
            raise ScheduleError(f"{field} is {quoted(document[field])}; expected {kind.__name__}")
    if len(name) > MOST_NAME:
        raise ScheduleError(f"its name has {len(name):,} characters; expected at most {MOST_NAME}")
    if num_microbatches < 1 or not placement or not rows:
        raise ScheduleError(
            f"num_microbatches is {quoted(num_microbatches)}, with {len(placement)} stages in placement and {len(rows)} "
            "rows; expected at least one of each"
        )
    for rank, row in enumerate(rows):
        if not isinstance(row, str):
            raise ScheduleError(f"rows[{rank}] is {quoted(row)}; rows are actions as text, one string for each rank")
    num_actions = sum(row.count(" ") + row.count(";") + 1 for row in rows)
    check_sizes(len(rows), len(placement), num_microbatches, num_actions)
    wrong = [stage for stage, rank in enumerate(placement) if type(rank) is not int or not 0 <= rank < len(rows)]
    if wrong:
        raise ScheduleError(
            f"placement puts stage {wrong[0]} on rank {quoted(placement[wrong[0]])}; expected one of the {len(rows)} ranks"
        )
    return Schedule(name, tuple(placement), num_microbatches, tuple(map(_row, range(len(rows)), rows)))


def _row(rank: int, text: str) -> Row:
    actions: list[Action] = []
    for number, cell in enumerate(filter(None, text.split(" ")), 1):
        try:
            actions += parse_cell(cell)
        except ScheduleError as error:
            raise ScheduleError(f"rows[{rank}], action {number}: {error}") from error
    return Row(as_table(actions))


def read_file(path: StrPath) -> Schedule:
    """Read a schedule in the format that the suffix names: .csv and .txt are tables, .json is JSON."""
    check_suffix(path)
    return from_json(path) if Path(path).suffix.lower() == ".json" else from_csv(path)


def check_suffix(path: StrPath) -> None:
    """Refuse a file whose suffix names no format.

    Raises:
        ScheduleError: naming the nearest known suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ScheduleError(f"{shown(path)}: unknown suffix {quoted(suffix)}; {one_of(suffix, SUFFIXES)}")


def write_file(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule in the format that the suffix names: .csv and .txt are tables, .json is JSON."""
    check_suffix(path)
    (to_json if Path(path).suffix.lower() == ".json" else to_csv)(schedule, path)
