"""Named schedules: from a name and integers to a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule import gpipe, interleaved_1f1b, looped_bfs, one_f_one_b, placement, zb_h1, zb_h2
from autofunc.schedule.ir import Row, Schedule, Table


@dataclass(frozen=True)
class Generator:
    """A named construction.

    `row` makes one rank's actions: of (rank, num_ranks, num_microbatches) when there is one stage per rank, else of
    (rank, num_ranks, num_microbatches, stages_per_rank).
    """

    row: Callable[..., Table]
    default_stages_per_rank: int = 1

    @property
    def is_looped(self) -> bool:
        """Whether it takes any number of stages per rank from two on."""
        return self.default_stages_per_rank > 1

    def rows(self, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> tuple[Row, ...]:
        """The actions of all ranks."""
        looped = (stages_per_rank,) if self.is_looped else ()
        return tuple(Row(self.row(rank, num_ranks, num_microbatches, *looped)) for rank in range(num_ranks))


GENERATORS: dict[str, Generator] = {
    "gpipe": Generator(gpipe.row),
    "1f1b": Generator(one_f_one_b.row),
    "interleaved_1f1b": Generator(interleaved_1f1b.row, default_stages_per_rank=2),
    "looped_bfs": Generator(looped_bfs.row, default_stages_per_rank=2),
    "zb_h1": Generator(zb_h1.row),
    "zb_h2": Generator(zb_h2.row),
}


def normalise(name: str) -> str:
    """The name in the registry for a user's spelling: case, `-`, `_` and torch's prefix `Schedule` do not matter.

    Raises:
        ScheduleError: for an unknown name, with the nearest known ones.
    """
    plain = _plain(name)
    for known in GENERATORS:
        if plain in (_plain(known), "schedule" + _plain(known)):
            return known
    raise ScheduleError(f"unknown schedule {name!r}: {one_of(name, GENERATORS)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def build(name: str, *, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """Build a named schedule.

    Args:
        name: one of `names()`, in any spelling.
        num_ranks: pp ranks, at least 1.
        num_microbatches: microbatches of a step, at least 1; fewer than ranks is allowed.
        stages_per_rank: stages on each rank: 1, or any number from 2 on for interleaved_1f1b and looped_bfs (2 by default).

    Raises:
        ScheduleError: for an unknown name, or numbers the construction does not allow.

    Example:
        >>> s = build("1f1b", num_ranks=2, num_microbatches=2)
        >>> print(*s[0])
        0F0 0F1 0B0 0B1
    """
    known = normalise(name)
    generator = GENERATORS[known]
    for label, number in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ScheduleError(f"schedule {known}: {label}={number}, expected at least 1")
    default = generator.default_stages_per_rank
    per_rank = default if stages_per_rank is None else stages_per_rank
    if per_rank != default and not (generator.is_looped and per_rank >= default):
        needs = f"{default} or more stages" if generator.is_looped else "exactly 1 stage"
        raise ScheduleError(
            f"schedule {known}: stages_per_rank={per_rank}, but it has {needs} per rank; with {num_ranks} ranks the model "
            f"must be split into {num_ranks * default}{' or a larger multiple' if generator.is_looped else ''} stages"
        )
    rows = generator.rows(num_ranks, num_microbatches, per_rank)
    return Schedule(known, placement.loop(num_ranks, per_rank), num_microbatches, rows)


def default_stages_per_rank(name: str) -> int:
    """How many stages a rank has when nothing else is said."""
    return GENERATORS[normalise(name)].default_stages_per_rank


def names() -> list[str]:
    """All named schedules."""
    return list(GENERATORS)
