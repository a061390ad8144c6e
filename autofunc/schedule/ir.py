"""The schedule as data: actions, rows and the frozen table.

An `Action` is one instruction of one rank. A `Schedule` holds one row of actions per rank. Rows are kept as int32 numpy
arrays (one line per action: stage, kind, microbatch, peer) and make `Action` objects on access, so that a schedule of
millions of actions stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int32]
"""int32 array of shape (number of actions, 4): stage, kind, microbatch, peer stage (-1 where there is none)."""


class Kind(IntEnum):
    """What an action does. The names are those of torch's text form."""

    F = 0  # forward
    B = 1  # full backward: I and W at once
    I = 2  # input gradient  # noqa: E741 - the field's own name
    W = 3  # weight gradients
    SEND_F = 4  # post the send of an activation to a later stage
    RECV_F = 5  # post the receive of an activation from an earlier stage
    SEND_B = 6  # post the send of a cotangent to an earlier stage
    RECV_B = 7  # post the receive of a cotangent from a later stage
    UNSHARD = 8  # gather a stage's sharded parameters
    RESHARD = 9  # free the gathered parameters
    REDUCE_GRAD = 10  # sum a stage's gradients over the data-parallel ranks

    @property
    def is_compute(self) -> bool:
        """F, B, I or W."""
        return self <= Kind.W

    @property
    def is_backward(self) -> bool:
        """B, I or W."""
        return Kind.B <= self <= Kind.W

    @property
    def is_send(self) -> bool:
        """SEND_F or SEND_B."""
        return self in (Kind.SEND_F, Kind.SEND_B)

    @property
    def is_receive(self) -> bool:
        """RECV_F or RECV_B."""
        return self in (Kind.RECV_F, Kind.RECV_B)

    @property
    def is_sharding(self) -> bool:
        """UNSHARD, RESHARD or REDUCE_GRAD: of a stage, for all microbatches."""
        return self >= Kind.UNSHARD


OVERLAPPED = -2
"""Takes the place of a peer: this F may overlap with the backward right after it, `(0F4;3B0)OVERLAP_F_B` in text."""


class Action(NamedTuple):
    """One instruction of one rank. `str(action)` is torch's text form, such as `2F0` or `1SEND_F3`."""

    stage: int
    kind: Kind
    microbatch: int
    peer: int = -1  # the other stage of a send or receive, or `OVERLAPPED`

    def __str__(self) -> str:
        if self.kind.is_sharding:
            return f"{self.stage}{self.kind.name}"
        text = f"{self.stage}{self.kind.name}{self.microbatch}"
        if self.kind.is_compute or self.peer == neighbour(self.stage, self.kind):
            return text
        return f"{text}{'>' if self.kind.is_send else '<'}{self.peer}"


def neighbour(stage: int, kind: Kind) -> int:
    """Return the stage at the other end of a send or receive in a chain, where each stage feeds the next."""
    return stage + 1 if kind in (Kind.SEND_F, Kind.RECV_B) else stage - 1


class Row(Sequence[Action]):
    """One rank's actions in order: a read-only view of its table."""

    __slots__ = ("table",)

    def __init__(self, table: Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Action: ...
    @overload
    def __getitem__(self, index: slice) -> Row: ...
    def __getitem__(self, index: int | slice) -> Action | Row:
        if isinstance(index, slice):
            return Row(self.table[index])
        stage, kind, microbatch, peer = self.table[index].tolist()
        return Action(stage, Kind(kind), microbatch, peer)

    def __iter__(self) -> Iterator[Action]:
        for stage, kind, microbatch, peer in self.table.tolist():
            yield Action(stage, Kind(kind), microbatch, peer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash(self.table.tobytes())

    def __repr__(self) -> str:
        return f"Row({' '.join(map(str, self))})"


def as_table(actions: Iterable[Action]) -> Table:
    """Pack actions into a read-only table."""
    rows = [(action.stage, int(action.kind), action.microbatch, action.peer) for action in actions]
    return frozen(np.array(rows, dtype=np.int32).reshape(-1, 4))


def compute_table(stage: npt.ArrayLike, kind: npt.ArrayLike, microbatch: npt.ArrayLike) -> Table:
    """Pack columns of compute actions into a read-only table; scalars are broadcast."""
    columns = np.broadcast_arrays(stage, kind, microbatch, -1)
    return frozen(np.stack(columns, axis=-1).astype(np.int32).reshape(-1, 4))


def is_transfer(table: Table) -> npt.NDArray[np.bool_]:
    """Mask the sends and receives of a table: bool of shape (number of actions,)."""
    return (table[:, 1] > Kind.W) & (table[:, 1] < Kind.UNSHARD)


def frozen(table: Table) -> Table:
    """Make a table read-only, and return it."""
    table.flags.writeable = False
    return table


def _stages_of_pair(rows: Table) -> tuple[int, int] | None:
    """Return the stages of an F and the B after it; None if there is no B."""
    return (int(rows[0, 0]), int(rows[1, 0])) if len(rows) == 2 and rows[1, 1] == Kind.B else None


@dataclass(frozen=True)
class Schedule:
    """Who computes what when. Plain data: immutable, and equal if all fields are.

    `schedule[rank]` is that rank's actions in order. A schedule is in compute form (F, B, I, W), as generators build it, or
    lowered: with sends and receives.
    """

    name: str
    placement: tuple[int, ...]  # stage -> rank
    num_microbatches: int
    rows: tuple[Row, ...] = field(repr=False)  # one per rank

    @property
    def num_ranks(self) -> int:
        """Number of pp ranks."""
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        """Number of stages on all ranks together."""
        return len(self.placement)

    def __getitem__(self, rank: int) -> Row:
        return self.rows[rank]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @cached_property
    def in_order(self) -> bool:
        """True if every stage runs its backwards in microbatch order, so that sums are in the oracle's order."""
        return all(self._is_ordered(kinds) for kinds in ((Kind.B, Kind.I), (Kind.B, Kind.W)))

    @cached_property
    def forwards_in_order(self) -> bool:
        """True if every stage runs its forwards in microbatch order, so that its state evolves as in the oracle."""
        return self._is_ordered((Kind.F,))

    def _is_ordered(self, kinds: tuple[Kind, ...]) -> bool:
        for row in self.rows:
            chosen = row.table[np.isin(row.table[:, 1], kinds)]
            by_stage = chosen[np.argsort(chosen[:, 0], kind="stable")]
            same_stage = np.diff(by_stage[:, 0]) == 0
            if (np.diff(by_stage[:, 2])[same_stage] < 0).any():
                return False
        return True

    @cached_property
    def is_lowered(self) -> bool:
        """True if it holds sends and receives."""
        return any(bool(is_transfer(row.table).any()) for row in self.rows)

    @cached_property
    def is_sharded(self) -> bool:
        """True if it gathers parameters before it uses them."""
        return any(bool((row.table[:, 1] == Kind.UNSHARD).any()) for row in self.rows)

    @cached_property
    def is_forward_only(self) -> bool:
        """True if it holds no backward action."""
        kinds = (Kind.B, Kind.I, Kind.W)
        return not any(bool(np.isin(row.table[:, 1], kinds).any()) for row in self.rows)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages placed on a rank, in order."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def compute_form(self) -> Schedule:
        """Return the schedule without its sends, receives and sharding actions."""
        rows = tuple(Row(frozen(row.table[row.table[:, 1] <= Kind.W])) for row in self.rows)
        return Schedule(self.name, self.placement, self.num_microbatches, rows)

    def forward_form(self, num_microbatches: int | None = None) -> Schedule:
        """Keep only the forwards, for evaluation.

        Args:
            num_microbatches: how many to keep, from the first; all by default.
        """
        count = self.num_microbatches if num_microbatches is None else num_microbatches
        tables = (row.table[(row.table[:, 1] == Kind.F) & (row.table[:, 2] < count)] for row in self.rows)
        return Schedule(self.name, self.placement, count, tuple(Row(frozen(table)) for table in tables)).without_overlap()

    def split_form(self) -> Schedule:
        """Replace every B by an I and a W, one right after the other."""
        rows = []
        for row in self.rows:
            parts = np.repeat(row.table, np.where(row.table[:, 1] == Kind.B, 2, 1), axis=0)
            both = np.flatnonzero(parts[:, 1] == Kind.B)
            parts[both[0::2], 1], parts[both[1::2], 1] = Kind.I, Kind.W
            rows.append(Row(frozen(parts)))
        return Schedule(self.name, self.placement, self.num_microbatches, tuple(rows))

    def without_overlap(self, keep: Set[tuple[int, int]] = frozenset()) -> Schedule:
        """Turn overlapped pairs into separate actions.

        Args:
            keep: (stage of F, stage of B) of the pairs that stay overlapped.
        """
        if not any(bool((row.table[:, 3] == OVERLAPPED).any()) for row in self.rows):
            return self
        tables = [row.table.copy() for row in self.rows]
        for table in tables:
            places = np.flatnonzero(table[:, 3] == OVERLAPPED)
            kept = [place for place in places if _stages_of_pair(table[place : place + 2]) in keep] if keep else []
            table[places, 3] = -1
            table[kept, 3] = OVERLAPPED
        rows = tuple(Row(frozen(table)) for table in tables)
        return Schedule(self.name, self.placement, self.num_microbatches, rows)
