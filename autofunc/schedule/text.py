"""The text form of actions and schedules: torch's action words, one line per rank.

`2F0` is stage 2, forward, microbatch 0. A send or receive between stages that are not neighbours names the other stage:
`0SEND_F3>2`, `2RECV_F3<0`. Sharding actions have no microbatch: `0UNSHARD`. A forward that may be overlapped with the
backward after it is written with it: `(0F4;3B0)OVERLAP_F_B`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.ir import OVERLAPPED, Action, Kind, Row, Schedule, as_table, neighbour

_ACTION = re.compile(r"(\d{1,9})([A-Z_]+)(\d{0,9})(?:([<>])(\d{1,9}))?")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


def parse_action(text: str) -> Action:
    """Read one action.

    Raises:
        ScheduleError: naming the text and the nearest known kind.
    """
    found = _ACTION.fullmatch(text.strip())
    if not found:
        raise ScheduleError(f"{text!r} is not an action: expected stage, kind, microbatch, such as '2F0' or '1SEND_F3'")
    stage, kind_name, microbatch, arrow, peer = found.groups()
    if kind_name not in Kind.__members__:
        raise ScheduleError(f"{text!r}: unknown kind of action {kind_name!r}; {one_of(kind_name, Kind.__members__)}")
    kind = Kind[kind_name]
    if kind.is_sharding == bool(microbatch):
        wanted = "no microbatch" if kind.is_sharding else "a microbatch, such as"
        raise ScheduleError(f"{text!r}: {kind.name} takes {wanted}{'' if kind.is_sharding else f' {stage}{kind.name}0'}")
    if arrow and arrow != (">" if kind.is_send else "<" if kind.is_receive else ""):
        raise ScheduleError(f"{text!r}: only sends go {stage}SEND_F0>2, and only receives come {stage}RECV_F0<0")
    if kind.is_sharding:
        return Action(int(stage), kind, -1)
    if kind.is_compute:
        return Action(int(stage), kind, int(microbatch))
    return Action(int(stage), kind, int(microbatch), int(peer) if peer else neighbour(int(stage), kind))


def parse_cell(text: str) -> list[Action]:
    """Read one cell of a table: an action, or an overlapped pair."""
    pair = _PAIR.fullmatch(text.strip())
    if not pair:
        return [parse_action(text)]
    forward, backward = map(parse_action, pair.groups())
    if forward.kind is not Kind.F or backward.kind not in (Kind.B, Kind.I):
        raise ScheduleError(f"{text!r}: expected a forward and a backward, such as '(0F4;3B0)OVERLAP_F_B'")
    return [forward._replace(peer=OVERLAPPED), backward]


def cells(row: Iterable[Action]) -> list[str]:
    """The text of a row's actions; an overlapped pair is one cell."""
    texts: list[str] = []
    forward: Action | None = None
    for action in row:
        if forward is not None:
            texts.append(f"({forward};{action})OVERLAP_F_B")
            forward = None
        elif action.peer == OVERLAPPED:
            forward = action
        else:
            texts.append(str(action))
    return texts if forward is None else [*texts, f"({forward};)OVERLAP_F_B"]


def to_text(schedule: Schedule) -> str:
    """One line per rank, actions separated by commas; a lone comma for a rank without actions."""
    return "\n".join(",".join(cells(row)) or "," for row in schedule) + "\n"


def from_text(text: str, name: str = "custom") -> Schedule:
    """Read what `to_text` wrote, or a table typed by hand. Spaces and empty cells are ignored.

    The placement and the number of microbatches are read off the forwards. Blank lines are no ranks.

    Raises:
        ScheduleError: when a cell is no action, or a stage has no forward.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    return from_actions([_parse_line(rank, line) for rank, line in enumerate(lines)], name)


def _parse_line(rank: int, line: str) -> list[Action]:
    actions: list[Action] = []
    for position, cell in enumerate(filter(None, re.split(r"[,\s]+", line))):
        try:
            actions += parse_cell(cell)
        except ScheduleError as error:
            raise ScheduleError(f"rank {rank}, position {position}: {error}") from error
    return actions


def from_actions(rows: Iterable[Iterable[Action]], name: str = "custom") -> Schedule:
    """Make a schedule of actions given as lists, one per rank. Placement and microbatches are read off the forwards.

    Raises:
        ScheduleError: when a stage has no forward.
    """
    rows = [list(row) for row in rows]
    placement: dict[int, int] = {}
    microbatches: set[int] = set()
    for rank, row in enumerate(rows):
        for action in row:
            if action.kind is Kind.F:
                placement.setdefault(action.stage, rank)
                microbatches.add(action.microbatch)
    stages = {action.stage for row in rows for action in row}
    missing = sorted(set(range(max(stages, default=-1) + 1)) - set(placement))
    if missing or not stages:
        raise ScheduleError(f"schedule {name!r}: no rank runs the forward of stage {missing or 0}")
    table = tuple(Row(as_table(row)) for row in rows)
    return Schedule(name, tuple(placement[stage] for stage in sorted(placement)), 1 + max(microbatches), table)
