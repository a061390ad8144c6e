"""Schedules as files: torch's CSV, and JSON of our own with a version.

The CSV is the one `torch.distributed.pipelining` loads and dumps (`_PipelineScheduleRuntime._load_csv`, formats
`compute_only` and `compute_comms`): a line per rank, a cell per action, empty cells where a rank idles. Which of the two a
table is, is seen from its actions. Sends between stages that are not neighbours have no form in torch; ours,
`0SEND_F3>2`, is read back here only.
"""

from __future__ import annotations

import json
from pathlib import Path

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.files.text_file import StrPath, read_json, read_text, write_text
from autofunc.schedule.ir import Row, Schedule, as_table
from autofunc.schedule.text import cells, from_text, parse_cell, to_text

FORMAT, VERSION = "autofunc.schedule", 1
SUFFIXES = (".csv", ".txt", ".json")


def to_csv(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule, in compute form or lowered, as torch's CSV."""
    write_text(path, to_text(schedule))


def from_csv(path: StrPath) -> Schedule:
    """Read torch's CSV, in either form; the file's name becomes the schedule's.

    Raises:
        ScheduleError: when there is no such file, a cell is no action, or a stage has no forward.
    """
    try:
        return from_text(read_text(path, SUFFIXES).replace('"', ""), Path(path).stem)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


def to_json(schedule: Schedule, path: StrPath) -> None:
    """Write everything a schedule holds."""
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
        ScheduleError: when there is no such file, or it is of another format or version.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ScheduleError(f'{path} is not a schedule: expected "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise ScheduleError(f"{path} has version {document.get('version')!r}; this release reads version {VERSION}")
    kinds = {"name": str, "num_microbatches": int, "placement": list, "rows": list}
    missing = [field for field in kinds if field not in document]
    if missing:
        raise ScheduleError(f"{path} lacks {', '.join(missing)}; a schedule has {', '.join(kinds)}")
    name, num_microbatches, placement, rows = (document[field] for field in kinds)
    for field, kind in kinds.items():
        if not isinstance(document[field], kind) or isinstance(document[field], bool):
            raise ScheduleError(f"{path}: {field} is {document[field]!r}; expected {kind.__name__}")
    if not all(isinstance(row, str) for row in rows):
        raise ScheduleError(f"{path}: rows are actions as text, one string for each rank")
    if not all(type(rank) is int and 0 <= rank < len(rows) for rank in placement):
        raise ScheduleError(f"{path}: placement is {placement}; expected for each stage one of the {len(rows)} ranks")
    tables = tuple(Row(as_table(action for cell in row.split() for action in parse_cell(cell))) for row in rows)
    return Schedule(name, tuple(placement), num_microbatches, tables)


def read_file(path: StrPath) -> Schedule:
    """Read a schedule from a file of any of our forms, by its suffix: .csv and .txt are tables, .json is JSON."""
    check_suffix(path)
    return from_json(path) if Path(path).suffix.lower() == ".json" else from_csv(path)


def check_suffix(path: StrPath) -> None:
    """Refuse a file whose suffix names no form.

    Raises:
        ScheduleError: naming the nearest that does.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ScheduleError(f"{path}: unknown suffix {suffix!r}; {one_of(suffix, SUFFIXES)}")


def write_file(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule in the form that its file's suffix names: .csv and .txt are tables, .json is JSON."""
    check_suffix(path)
    (to_json if Path(path).suffix.lower() == ".json" else to_csv)(schedule, path)
