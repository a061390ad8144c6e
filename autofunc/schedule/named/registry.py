"""Named schedules: from a name and integers to a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule import placement
from autofunc.schedule.files.schedule_file import SUFFIXES
from autofunc.schedule.ir import Row, Schedule, Table
from autofunc.schedule.named import (
    dualpipe_v,
    eager_1f1b,
    gpipe,
    interleaved_1f1b,
    interleaved_zb,
    looped_bfs,
    one_f_one_b,
    v_half,
    v_min,
    zb_h1,
    zb_h2,
    zbv,
)
from autofunc.schedule.named.custom import Function, schedule_of_file, schedule_of_function


@dataclass(frozen=True)
class Generator:
    """A named construction.

    `row` makes one rank's actions from (rank, num_ranks, num_microbatches), and stages_per_rank if `is_looped`.
    """

    row: Callable[..., Table]
    default_stages_per_rank: int = 1
    is_looped: bool = False  # takes any number of stages per rank, `default_stages_per_rank` or more
    placement: Callable[[int, int], tuple[int, ...]] = placement.loop
    microbatches_per_rank: int = 0  # least number of microbatches per rank

    def fits(self, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> bool:
        """Return whether the construction exists for these numbers."""
        enough = num_microbatches >= self.microbatches_per_rank * num_ranks
        default = self.default_stages_per_rank
        return enough and (stages_per_rank == default or (self.is_looped and stages_per_rank > default))

    def make_row(self, rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Row:
        """The actions of one rank."""
        looped = (stages_per_rank,) if self.is_looped else ()
        return Row(self.row(rank, num_ranks, num_microbatches, *looped))


def _looped(row: Callable[..., Table]) -> Generator:
    return Generator(row, default_stages_per_rank=2, is_looped=True)


def _v_shaped(row: Callable[..., Table], microbatches_per_rank: int = 0) -> Generator:
    return Generator(
        row, default_stages_per_rank=2, placement=placement.v_shape, microbatches_per_rank=microbatches_per_rank
    )


GENERATORS: dict[str, Generator] = {
    "gpipe": Generator(gpipe.row),
    "1f1b": Generator(one_f_one_b.row),
    "eager_1f1b": Generator(eager_1f1b.row),
    "interleaved_1f1b": _looped(interleaved_1f1b.row),
    "looped_bfs": _looped(looped_bfs.row),
    "zb_h1": Generator(zb_h1.row),
    "zb_h2": Generator(zb_h2.row),
    "interleaved_zb": _looped(interleaved_zb.row),
    "zbv": _v_shaped(zbv.row),
    "v_half": _v_shaped(v_half.row),
    "v_min": _v_shaped(v_min.row),
    "dualpipe_v": _v_shaped(dualpipe_v.row, microbatches_per_rank=2),
}


_TORCH_NAMES = {"interleavedzerobubble": "interleaved_zb", "zbvzerobubble": "zbv"}


def normalise(name: str) -> str:
    """Return the registry's name for a user's spelling: case, `-` and `_` are ignored, torch's class names accepted.

    Raises:
        ScheduleError: for an unknown name, with the nearest known ones.
    """
    plain = _plain(name).removeprefix("schedule")
    for known in GENERATORS:
        if plain == _plain(known):
            return known
    if plain in _TORCH_NAMES:
        return _TORCH_NAMES[plain]
    raise ScheduleError(
        f"unknown schedule {name!r}: {one_of(name, GENERATORS)}; or a .csv, .txt or .json file, or a function"
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def build(
    name: str | os.PathLike[str] | Function,
    *,
    num_ranks: int,
    num_microbatches: int,
    stages_per_rank: int | None = None,
) -> Schedule:
    """Build a schedule: a named one, or the user's own.

    Args:
        name: one of `names()`, in any spelling; or a file that ends in .csv, .txt or .json; or a function of
            `num_ranks` and `num_microbatches` (and `stages_per_rank`, if it names it) that returns a `Schedule`, a table
            as text, or for each rank a list of actions such as "2F0".
        num_ranks: pp ranks, at least 1.
        num_microbatches: microbatches of a step, at least 1; may be fewer than ranks, except for dualpipe_v.
        stages_per_rank: stages on each rank: the construction's default, or any larger number for
            interleaved_1f1b, interleaved_zb and looped_bfs.

    Raises:
        ScheduleError: for an unknown name, numbers the construction does not allow, or a user's schedule that breaks a law
            or does not have the numbers asked for.

    Example:
        >>> s = build("1f1b", num_ranks=2, num_microbatches=2)
        >>> print(*s[0])
        0F0 0F1 0B0 0B1
    """
    if not is_named(name):
        if callable(name):
            return schedule_of_function(name, num_ranks, num_microbatches, stages_per_rank)
        return schedule_of_file(os.fspath(name), num_ranks, num_microbatches, stages_per_rank)
    known, generator, per_rank = _checked(str(name), num_ranks, num_microbatches, stages_per_rank)
    rows = tuple(generator.make_row(rank, num_ranks, num_microbatches, per_rank) for rank in range(num_ranks))
    return Schedule(known, generator.placement(num_ranks, per_rank), num_microbatches, rows)


def is_named(name: str | os.PathLike[str] | Function) -> bool:
    """Return whether this names a schedule of the registry, rather than a file or a function."""
    return isinstance(name, str) and not name.lower().endswith(SUFFIXES)


def build_row(name: str, *, rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Row:
    """Build one rank's row of a named schedule without the others, as each of a thousand ranks needs.

    Raises:
        ScheduleError: as `build` does, or for a rank that does not exist.
    """
    _, generator, per_rank = _checked(name, num_ranks, num_microbatches, stages_per_rank)
    if not 0 <= rank < num_ranks:
        raise ScheduleError(f"rank={rank}: there are ranks 0 to {num_ranks - 1}")
    return generator.make_row(rank, num_ranks, num_microbatches, per_rank)


def _checked(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None) -> tuple[str, Generator, int]:
    """Find the generator of a name and its stages per rank; refuse numbers that it cannot be built for."""
    known = normalise(name)
    generator = GENERATORS[known]
    for label, number in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ScheduleError(f"schedule {known}: {label}={number}, expected at least 1")
    default = generator.default_stages_per_rank
    per_rank = default if stages_per_rank is None else stages_per_rank
    least = generator.microbatches_per_rank * num_ranks
    if num_microbatches < least:
        raise ScheduleError(
            f"schedule {known}: num_microbatches={num_microbatches}, but with {num_ranks} ranks it needs at least {least}, "
            f"{generator.microbatches_per_rank} per rank; zbv takes any number"
        )
    if not generator.fits(num_ranks, num_microbatches, per_rank):
        needs = f"{default} or more stages" if generator.is_looped else f"exactly {default} stage{'s' * (default > 1)}"
        raise ScheduleError(
            f"schedule {known}: stages_per_rank={per_rank}, but it has {needs} per rank; with {num_ranks} ranks the model "
            f"must be split into {num_ranks * default}{' or a larger multiple' if generator.is_looped else ''} stages"
        )
    return known, generator, per_rank


def default_stages_per_rank(name: str) -> int:
    """Return how many stages a rank of a named schedule has by default."""
    return GENERATORS[normalise(name)].default_stages_per_rank


def is_looped(name: str) -> bool:
    """Return whether a named schedule takes any larger number of stages per rank."""
    return GENERATORS[normalise(name)].is_looped


def names() -> list[str]:
    """The names of all named schedules, in the order of the registry."""
    return list(GENERATORS)


def named_candidates(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Iterator[Schedule]:
    """Build every named schedule that exists for these numbers."""
    for name, generator in GENERATORS.items():
        if generator.fits(num_ranks, num_microbatches, stages_per_rank):
            yield build(name, num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank)
