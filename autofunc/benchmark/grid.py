"""From choices to contenders: every combination that can run, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product, zip_longest

from autofunc.benchmark.contender import AUTOFUNC, PLAIN, TORCH, Contender, LeftOut, named
from autofunc.benchmark.torch_names import COUNTERPARTS, ON_ONE_RANK, TORCH_SCHEDULES
from autofunc.engine import EngineOptions
from autofunc.errors import AutofuncError, ScheduleError, one_of
from autofunc.schedule import build, is_named, normalise
from autofunc.shown import shown

AGAINST = (TORCH, PLAIN)
"""Sides that autofunc can be measured against."""


@dataclass(frozen=True)
class Grid:
    """The choices to combine.

    Args:
        schedules: names from `af.schedule.names()`, or anything else `af.schedule.build` takes.
        pp: numbers of pipeline ranks.
        microbatches: numbers of microbatches that a step's rows are cut into.
        engines: see `af.pipeline`.
        compile: see `af.pipeline`.
        remat: see `af.pipeline`; "auto" is refused, since it needs a memory budget.
        against: "torch" adds torch's counterpart of each schedule, "plain" the plain microbatch loop.
        torch_schedules: torch's names of schedules to measure instead of the counterparts.

    Raises:
        AutofuncError: for an unknown choice.
    """

    schedules: tuple[str, ...] = ("1f1b",)
    pp: tuple[int, ...] = (2,)
    microbatches: tuple[int, ...] = (8,)
    engines: tuple[str, ...] = ("graph",)
    compile: tuple[bool | str, ...] = (False,)
    remat: tuple[str | None, ...] = (None,)
    against: tuple[str, ...] = ()
    torch_schedules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if not values and name not in ("against", "torch_schedules"):
                raise AutofuncError(f"bench: {name} is empty; expected at least one")
        for name in ("pp", "microbatches"):
            if any(number < 1 for number in getattr(self, name)):
                raise AutofuncError(f"bench: {name}={getattr(self, name)}; expected positive numbers")
        for other in self.against:
            if other not in AGAINST:
                raise AutofuncError(f"bench: against {shown(other)}: {one_of(other, AGAINST)}")
        for other in self.torch_schedules:
            if other not in TORCH_SCHEDULES:
                raise AutofuncError(f"bench: torch has no schedule {shown(other)}: {one_of(other, TORCH_SCHEDULES)}")
        for remat in self.remat:
            if remat == "auto":
                raise AutofuncError("bench: remat auto needs a memory budget; expected none, layer or stage")
            EngineOptions(remat=remat)
        for engine in self.engines:
            EngineOptions(engine)
        for choice in self.compile:
            EngineOptions(compile=choice)

    def contenders(self, processes: int, only: Sequence[str] = ("*",)) -> tuple[dict[str, Contender], list[LeftOut]]:
        """Return the contenders that this many processes can run, by name, sides alternating, and those left out.

        One process runs all ranks of a pipeline in turn; several processes are one rank each.

        Args:
            processes: the number of processes.
            only: patterns; a contender's name must match one.

        Raises:
            AutofuncError: for an unknown schedule, or if no contender is left.
        """
        ours, theirs, left = _Kept(), _Kept(), _Left()
        for pp, microbatches in product(self.pp, self.microbatches):
            if 1 < processes < pp:
                left.add(f"pp={pp}", f"it needs {pp} processes, or one that runs all ranks; there are {processes}")
                continue
            for name in self.schedules:
                self._ours(name, pp, microbatches, ours, left)
            if TORCH in self.against:
                for name, stages in self._of_torch(pp, microbatches, processes, left):
                    self._theirs(name, pp, microbatches, stages, theirs, left)
        plain = [Contender(PLAIN, "loop", 1, each, 1, "eager") for each in self.microbatches if PLAIN in self.against]
        mixed = [each for pair in zip_longest(ours.found, theirs.found) for each in pair if each is not None]
        found = named([*mixed, *plain])
        chosen = {name: each for name, each in found.items() if any(fnmatchcase(name, pattern) for pattern in only)}
        if not chosen:
            why = [f"{each.name}: {each.why}" for each in left.found] or [f"no name fits {' or '.join(map(shown, only))}"]
            raise AutofuncError("bench: nothing to measure. " + "; ".join(why))
        return chosen, left.found

    def _ours(self, name: str, pp: int, microbatches: int, kept: _Kept, left: _Left) -> None:
        try:
            made = build(name, num_ranks=pp, num_microbatches=microbatches)
        except ScheduleError as error:
            if is_named(name):
                normalise(name)  # an unknown name ends the benchmark
            left.add(f"{AUTOFUNC} {shown(name)}", str(error))
            return
        for engine, choice, remat in product(self.engines, self.compile, self.remat):
            spelt = normalise(name) if is_named(name) else name
            each = Contender(AUTOFUNC, spelt, pp, microbatches, made.num_stages, engine, choice, remat)
            try:
                EngineOptions(engine, choice, remat)
            except AutofuncError as error:
                left.add(f"{AUTOFUNC} {engine}, {each.how}", str(error))
                continue
            kept.add(each)

    def _of_torch(self, pp: int, microbatches: int, processes: int, left: _Left) -> Iterator[tuple[str, int]]:
        """Yield torch's schedules, and the numbers of stages to measure them with."""
        wanted: list[tuple[str, int]] = []
        for name in self.torch_schedules:
            wanted.append((name, pp * (TORCH_SCHEDULES[name].per_rank or 2)))
        for name in self.schedules if not self.torch_schedules else ():
            if not is_named(name) or normalise(name) not in COUNTERPARTS:
                left.add(f"{TORCH} {shown(name)}", "torch.distributed.pipelining does not have this schedule")
                continue
            wanted.append((COUNTERPARTS[normalise(name)], _stages(name, pp, microbatches)))
        for name, stages in wanted:
            if processes > 1 or pp == 1 == TORCH_SCHEDULES[name].per_rank:
                yield name, stages
            elif TORCH_SCHEDULES[name].in_v and stages != 2:
                left.add(f"{TORCH} {name}", "it has two stages per rank, and one process is one of torch's ranks")
            else:
                yield ON_ONE_RANK.get(name, name), stages

    def _theirs(self, name: str, pp: int, microbatches: int, stages: int, kept: _Kept, left: _Left) -> None:
        if stages == 0:
            return  # ours is left out for these sizes, and reported
        for choice in dict.fromkeys("graphs" if each == "graphs" else bool(each) for each in self.compile):
            if choice == "graphs":
                left.add(f"{TORCH} {name}, CUDA graphs", "torch.distributed.pipelining records no steps")
            elif choice and TORCH_SCHEDULES[name].splits_backward:
                left.add(f"{TORCH} {name} compiled", "torch refuses compiled modules if I and W are separate")
            else:
                kept.add(Contender(TORCH, name, pp, microbatches, stages, "eager", choice))
        if any(remat is not None for remat in self.remat):
            left.add(f"{TORCH} with remat", "torch.distributed.pipelining has no such option")


def _stages(name: str, pp: int, microbatches: int) -> int:
    try:
        return build(name, num_ranks=pp, num_microbatches=microbatches).num_stages
    except ScheduleError:
        return 0


class _Kept:
    """Distinct contenders, in order."""

    def __init__(self) -> None:
        self._found: dict[Contender, None] = {}

    def add(self, contender: Contender) -> None:
        self._found[contender] = None

    @property
    def found(self) -> Sequence[Contender]:
        return list(self._found)


class _Left:
    """Distinct contenders that are left out, in order."""

    def __init__(self) -> None:
        self.found: list[LeftOut] = []

    def add(self, name: str, why: str) -> None:
        line = LeftOut(name, why.partition("\n")[0])
        if line not in self.found:
            self.found.append(line)
