"""The text form of actions and schedules: torch's names of actions, one line per rank.

`2F0` is stage 2, forward, microbatch 0. A send or receive between stages that are not neighbours names the other stage:
`0SEND_F3>2`, `2RECV_F3<0`. Sharding actions have no microbatch: `0UNSHARD`. A forward that may be overlapped with the
backward after it is written together with it: `(0F4;3B0)OVERLAP_F_B`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from autofunc.errors import ScheduleError, one_of, some_of
from autofunc.schedule.ir import OVERLAPPED, Action, Kind, Row, Schedule, as_table, neighbour
from autofunc.schedule.limits import MOST_RANKS, check_action, check_sizes
from autofunc.shown import quoted

_ACTION = re.compile(r"([0-9]{1,9})([A-Z_]+)([0-9]{0,9})(?:([<>])([0-9]{1,9}))?")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_SPACES = " \t"
_BETWEEN_CELLS = re.compile(rf"[{_SPACES}]*,[{_SPACES}]*|[{_SPACES}]+")
_BETWEEN_LINES = re.compile("\r\n|\r|\n")

Place = Callable[[int, int], str]
"""Describe a (rank, position) of a table, for messages."""


def parse_action(text: str) -> Action:
    """Read one action.

    Raises:
        ScheduleError: naming the text and the nearest known kind; or for numbers beyond the limits.
    """
    found = _ACTION.fullmatch(text.strip(_SPACES))
    if not found:
        raise ScheduleError(
            f"{quoted(text)} is not an action: expected stage, kind, microbatch, such as '2F0' or '1SEND_F3'"
        )
    stage, kind_name, microbatch, arrow, peer = found.groups()
    if kind_name not in Kind.__members__:
        raise ScheduleError(
            f"{quoted(text)}: unknown kind of action {quoted(kind_name)}; {one_of(kind_name, Kind.__members__)}"
        )
    kind = Kind[kind_name]
    if kind.is_sharding == bool(microbatch):
        wanted = "no microbatch" if kind.is_sharding else "a microbatch, such as"
        raise ScheduleError(f"{text!r}: {kind.name} takes {wanted}{'' if kind.is_sharding else f' {stage}{kind.name}0'}")
    if arrow and arrow != (">" if kind.is_send else "<" if kind.is_receive else ""):
        raise ScheduleError(f"{text!r}: only sends go {stage}SEND_F0>2, and only receives come {stage}RECV_F0<0")
    action = Action(int(stage), kind, int(microbatch) if microbatch else -1)
    if not (kind.is_sharding or kind.is_compute):
        action = action._replace(peer=int(peer) if peer else neighbour(int(stage), kind))
    try:
        check_action(action.stage, action.microbatch, action.peer)
    except ScheduleError as error:
        raise ScheduleError(f"{text!r}: {error}") from error
    return action


def parse_cell(text: str) -> list[Action]:
    """Read one cell of a table: an action, or an overlapped pair."""
    pair = _PAIR.fullmatch(text.strip(_SPACES))
    if not pair:
        return [parse_action(text)]
    forward, backward = map(parse_action, pair.groups())
    if forward.kind is not Kind.F or backward.kind not in (Kind.B, Kind.I):
        raise ScheduleError(f"{quoted(text)}: expected a forward and a backward, such as '(0F4;3B0)OVERLAP_F_B'")
    return [forward._replace(peer=OVERLAPPED), backward]


def cells(row: Iterable[Action]) -> list[str]:
    """Return the text of a row's actions; an overlapped pair is one cell."""
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
    """Write one line per rank, actions separated by commas; a lone comma for a rank without actions."""
    return "\n".join(",".join(cells(row)) or "," for row in schedule) + "\n"


def from_text(text: str, name: str = "custom") -> Schedule:
    """Read what `to_text` wrote, or a table typed by hand. Spaces and empty cells are ignored.

    The placement and the number of microbatches follow from the forwards. Blank lines are skipped.

    Raises:
        ScheduleError: if a cell is not an action, naming its line and column; if a stage has no forward, or the numbers
            are beyond the limits.
    """
    lines = [(number, line) for number, line in enumerate(_BETWEEN_LINES.split(text), 1) if line.strip(_SPACES)]
    if len(lines) > MOST_RANKS:
        raise ScheduleError(f"it has {len(lines):,} ranks, one for each line; a schedule has at most {MOST_RANKS:,}")
    rows = [_parse_line(number, line) for number, line in lines]
    return from_actions(
        [[action for action, _ in row] for row in rows], name,
        lambda rank, position: f"line {lines[rank][0]}, column {rows[rank][position][1]}",
    )  # fmt: skip


def _parse_line(number: int, line: str) -> list[tuple[Action, int]]:
    """Return the actions of a line, each with its column."""
    actions: list[tuple[Action, int]] = []
    for column, cell in enumerate(_BETWEEN_CELLS.split(line.strip(_SPACES)), 1):
        try:
            actions += [(action, column) for action in (parse_cell(cell) if cell else ())]
        except ScheduleError as error:
            raise ScheduleError(f"line {number}, column {column}: {error}") from error
    return actions


def _in_row(rank: int, position: int) -> str:
    return f"rank {rank}, position {position}"


def from_actions(rows: Iterable[Iterable[Action]], name: str = "custom", place: Place = _in_row) -> Schedule:
    """Make a schedule from lists of actions, one per rank. Placement and microbatches follow from the forwards.

    Args:
        rows: actions of each rank, in order.
        name: of the schedule.
        place: describes where an action is, for errors.

    Raises:
        ScheduleError: if a stage has no forward, or the numbers are beyond the limits.
    """
    listed = [list(row) for row in rows]
    placement: dict[int, int] = {}
    last, at = -1, (0, 0)
    for rank, row in enumerate(listed):
        for position, action in enumerate(row):
            if action.kind is Kind.F:
                placement.setdefault(action.stage, rank)
                if action.microbatch > last:
                    last, at = action.microbatch, (rank, position)
    claim = f"{listed[at[0]][at[1]]} ({place(*at)}) is in a table that" if last >= 0 else "it"
    _check_forwards(listed, placement)
    check_sizes(len(listed), len(placement), last + 1, sum(map(len, listed)), claim)
    table = tuple(Row(as_table(row)) for row in listed)
    return Schedule(name, tuple(placement[stage] for stage in sorted(placement)), last + 1, table)


def _check_forwards(rows: Sequence[Sequence[Action]], placement: dict[int, int]) -> None:
    """Refuse actions of a stage that has no forward."""
    stages = {action.stage for row in rows for action in row}
    if not stages:
        raise ScheduleError("there are no actions, so this is not a schedule")
    check_action(max(stages), -1, -1)
    missing = [stage for stage in range(max(stages) + 1) if stage not in placement]
    if missing:
        raise ScheduleError(f"no rank runs the forward of stage {some_of(missing)}")
