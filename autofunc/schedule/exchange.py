"""Schedules as files: torch's CSV, and JSON of our own with a version.

The CSV is the one `torch.distributed.pipelining` loads and dumps (`_PipelineScheduleRuntime._load_csv`, formats
`compute_only` and `compute_comms`): a line per rank, a cell per action, empty cells where a rank idles. Which of the two a
table is, is seen from its actions. Sends between stages that are not neighbours have no form in torch; ours,
`0SEND_F3>2`, is read back here only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.ir import Row, Schedule, as_table
from autofunc.schedule.text import cells, from_text, parse_cell, to_text

FORMAT, VERSION = "autofunc.schedule", 1
SUFFIXES = (".csv", ".txt", ".json")

StrPath = str | os.PathLike[str]


def to_csv(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule, in compute form or lowered, as torch's CSV."""
    Path(path).write_text(to_text(schedule), encoding="utf-8")


def from_csv(path: StrPath) -> Schedule:
    """Read torch's CSV, in either form; the file's name becomes the schedule's.

    Raises:
        ScheduleError: when there is no such file, a cell is no action, or a stage has no forward.
    """
    return from_text(_read(path), Path(path).stem)


def to_json(schedule: Schedule, path: StrPath) -> None:
    """Write everything a schedule holds."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": schedule.name,
        "num_microbatches": schedule.num_microbatches,
        "placement": list(schedule.placement),
        "in_order": schedule.in_order,
        "rows": [" ".join(cells(row)) for row in schedule],
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def from_json(path: StrPath) -> Schedule:
    """Read what `to_json` wrote.

    Raises:
        ScheduleError: when there is no such file, or it is of another format or version.
    """
    try:
        document = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ScheduleError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ScheduleError(f'{path} is not a schedule: expected "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise ScheduleError(f"{path} has version {document.get('version')!r}; this release reads version {VERSION}")
    fields = ("name", "num_microbatches", "placement", "in_order", "rows")
    missing = [field for field in fields if field not in document]
    if missing:
        raise ScheduleError(f"{path} lacks {', '.join(missing)}; a schedule has {', '.join(fields)}")
    rows = tuple(Row(as_table(action for cell in row.split() for action in parse_cell(cell))) for row in document["rows"])
    placement = tuple(int(rank) for rank in document["placement"])
    return Schedule(str(document["name"]), placement, int(document["num_microbatches"]), rows, bool(document["in_order"]))


def read_file(path: StrPath) -> Schedule:
    """Read a schedule from a file of any of our forms, by its suffix: .csv and .txt are tables, .json is JSON."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ScheduleError(f"{path}: unknown suffix {suffix!r}; {one_of(suffix, SUFFIXES)}")
    return from_json(path) if suffix == ".json" else from_csv(path)


def write_file(schedule: Schedule, path: StrPath) -> None:
    """Write a schedule in the form that its file's suffix names: .csv and .txt are tables, .json is JSON."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ScheduleError(f"{path}: unknown suffix {suffix!r}; {one_of(suffix, SUFFIXES)}")
    (to_json if suffix == ".json" else to_csv)(schedule, path)


def _read(path: StrPath) -> str:
    file = Path(path)
    if not file.is_file():
        folder = file.parent
        near = [str(other) for other in folder.iterdir() if other.suffix in SUFFIXES] if folder.is_dir() else []
        raise ScheduleError(f"there is no file {str(path)!r}; {one_of(str(path), sorted(near))}")
    return file.read_text(encoding="utf-8")
