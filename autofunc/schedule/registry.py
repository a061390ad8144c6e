"""Named schedules: from a name and integers to a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule import gpipe, one_f_one_b, placement
from autofunc.schedule.ir import Row, Schedule, Table


@dataclass(frozen=True)
class Generator:
    """A named construction. `row(rank, num_ranks, num_microbatches)` makes one rank's actions."""

    row: Callable[[int, int, int], Table]
    stages_per_rank: int = 1


GENERATORS: dict[str, Generator] = {
    "gpipe": Generator(gpipe.row),
    "1f1b": Generator(one_f_one_b.row),
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


def build(name: str, *, num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Schedule:
    """Build a named schedule.

    Args:
        name: one of `names()`, in any spelling.
        num_ranks: pp ranks, at least 1.
        num_microbatches: microbatches of a step, at least 1; fewer than ranks is allowed.
        stages_per_rank: stages on each rank; the schedules known so far have exactly one.

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
    if stages_per_rank != generator.stages_per_rank:
        raise ScheduleError(
            f"schedule {known}: stages_per_rank={stages_per_rank}, but it has exactly {generator.stages_per_rank} stage "
            f"per rank; with {num_ranks} ranks the model must be split into {num_ranks * generator.stages_per_rank} stages"
        )
    rows = tuple(Row(generator.row(rank, num_ranks, num_microbatches)) for rank in range(num_ranks))
    return Schedule(known, placement.loop(num_ranks, stages_per_rank), num_microbatches, rows)


def names() -> list[str]:
    """All named schedules."""
    return list(GENERATORS)
