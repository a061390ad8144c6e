"""Results of a benchmark, as plain data that can be written as JSON and read again."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

from autofunc.benchmark.contender import AUTOFUNC, TORCH, Contender, LeftOut
from autofunc.benchmark.turns import paired_ratios
from autofunc.errors import AutofuncError, one_of
from autofunc.schedule import Timeline

VERSION = 1
"""Version of the JSON format."""


class Spread(NamedTuple):
    """Median, minimum and maximum of some numbers."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Summarise at least one number."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclass(frozen=True)
class Measured:
    """Measurements of one contender. None: not known here; see docs/benchmarks.md."""

    name: str
    contender: Contender
    step_ms: tuple[float, ...]  # by repetition; the slowest process counts
    build_s: float  # until the end of its first step
    gradient_error: float | None  # relative to the plain loop's; None: not compared
    units_per_second: float  # tokens, or rows, at the median
    mfu: float | None  # model FLOPs utilization, at the median
    bubble: float | None  # measured fraction
    schedule_bubble: float | None  # of the schedule, with this run's costs
    peak_bytes: tuple[int, ...]  # by process: a step's memory beyond parameters and batch, with temporaries
    live_bytes: tuple[int, ...] | None  # by pp rank: most bytes alive between actions, measured
    predicted_bytes: tuple[int, ...] | None  # the same, predicted from the schedule and the graphs
    timeline: Timeline | None = field(default=None, repr=False, compare=False)  # not part of the JSON

    @property
    def ms(self) -> Spread:
        """Spread of its step times, in milliseconds."""
        return Spread.of(self.step_ms)


@dataclass(frozen=True)
class Record:
    """Results of a benchmark.

    Args:
        measured: contenders in the order of their turns.
        left_out: contenders asked for but not measured, and why.
        setting: the model and the machine, as JSON names and values.
        unit: "tokens" or "rows".
    """

    measured: tuple[Measured, ...]
    left_out: tuple[LeftOut, ...]
    setting: Mapping[str, Any]
    unit: str

    def __getitem__(self, name: str) -> Measured:
        """Return a contender's measurements by name.

        Raises:
            AutofuncError: naming the nearest one.
        """
        for each in self.measured:
            if each.name == name:
                return each
        raise AutofuncError(f"no contender {name!r}: {one_of(name, [each.name for each in self.measured])}")

    def of(self, side: str) -> list[Measured]:
        """Return the contenders of a side, the fastest by median first."""
        return sorted((each for each in self.measured if each.contender.side == side), key=lambda each: each.ms.median)

    @property
    def baseline(self) -> Measured:
        """The contender that others are compared with: torch's fastest, or without torch the first one."""
        theirs = self.of(TORCH)
        return theirs[0] if theirs else self.measured[0]

    def speedup(self, ours: Measured, theirs: Measured) -> Spread:
        """Return how many times as long `theirs` takes, over the pairs of each repetition."""
        return Spread.of(paired_ratios(ours.step_ms, theirs.step_ms))

    def answers(self) -> list[tuple[str, Measured, Measured, Spread]]:
        """Return (question, autofunc's fastest, torch's fastest, how many times as long torch takes)."""
        ours, theirs = self.of(AUTOFUNC), self.of(TORCH)
        asked = {"best against best": (ours, theirs)}
        if len({bool(each.contender.compile) for each in theirs}) > 1:
            asked["best against torch's eager"] = (ours, [each for each in theirs if not each.contender.compile])
            asked["best against torch's compiled"] = (ours, [each for each in theirs if each.contender.compile])
        return [(what, a[0], b[0], self.speedup(a[0], b[0])) for what, (a, b) in asked.items() if a and b]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON-compatible data, without timelines."""
        return {
            "version": VERSION,
            "setting": dict(self.setting),
            "unit": self.unit,
            "baseline": self.baseline.name if self.measured else None,
            "contenders": [self._entry(each) for each in self.measured],
            "left_out": [asdict(each) for each in self.left_out],
        }

    def _entry(self, each: Measured) -> dict[str, Any]:
        entry = {name: value for name, value in vars(each).items() if name not in ("timeline", "contender")}
        ratios = self.speedup(each, self.baseline)
        return {
            **entry, **asdict(each.contender), "median_ms": each.ms.median, "speedup_over_baseline": ratios._asdict(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            AutofuncError: if it has a different version.
        """
        if given.get("version") != VERSION:
            raise AutofuncError(f"this is a benchmark of version {given.get('version')!r}; expected {VERSION}")
        return cls(
            tuple(_measured(each) for each in given["contenders"]),
            tuple(LeftOut(**each) for each in given["left_out"]),
            given["setting"],
            given["unit"],
        )


def _measured(entry: Mapping[str, Any]) -> Measured:
    of_contender = {name: entry[name] for name in Contender.__dataclass_fields__}
    own = {name: entry[name] for name in Measured.__dataclass_fields__ if name not in ("contender", "timeline")}
    as_tuples: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    return Measured(contender=Contender(**of_contender), **as_tuples)
