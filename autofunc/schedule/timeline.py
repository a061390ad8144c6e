"""A timeline: when each action ran. The simulator makes one, and so can a measured run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Kind, Schedule

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """How long one action of one stage takes: scalars, or one value per stage. A full backward takes `I + W`.

    `comm` is the time of one transfer between ranks. All in one unit of the user's choice.
    """

    F: float | Sequence[float] = 1.0
    I: float | Sequence[float] = 1.0  # noqa: E741 - the field's own name
    W: float | Sequence[float] = 1.0
    comm: float = 0.0

    def of(self, stage: int, kind: Kind) -> float:
        """The time of a computation."""
        if kind is Kind.B:
            return self.of(stage, Kind.I) + self.of(stage, Kind.W)
        cost = {Kind.F: self.F, Kind.I: self.I, Kind.W: self.W}[kind]
        return float(cost) if np.ndim(cost) == 0 else float(cost[stage])  # type: ignore[arg-type, index]

    def check(self, num_stages: int) -> None:
        """Refuse costs that do not fit a number of stages.

        Raises:
            ScheduleError: for a wrong number of values, a negative one, or stages whose every action is free.
        """
        for name in ("F", "I", "W", "comm"):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            expected = "a number" if name == "comm" else f"a number, or one for each of {num_stages} stages"
            if value.ndim and (name == "comm" or value.shape != (num_stages,)):
                raise ScheduleError(f"Costs.{name} has shape {value.shape}; expected {expected}")
            if (value < 0).any():
                raise ScheduleError(f"Costs.{name}={getattr(self, name)}: a time cannot be negative")
        if not any(np.any(np.asarray(getattr(self, name))) for name in ("F", "I", "W")):
            raise ScheduleError("Costs: F, I and W are all 0, so nothing takes any time")


@dataclass(frozen=True)
class Timeline:
    """When each action of a schedule starts and ends: one array per rank, in the order of its row."""

    schedule: Schedule
    start: tuple[Times, ...] = field(repr=False)
    end: tuple[Times, ...] = field(repr=False)

    @cached_property
    def makespan(self) -> float:
        """From the first start to the last end."""
        first = min(times.min() for times in self.start if times.size)
        return float(max(times.max() for times in self.end if times.size) - first)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, the time spent computing."""
        return tuple(float((end - start).sum()) for start, end in zip(self.start, self.end, strict=True))

    @cached_property
    def bubble_fraction(self) -> float:
        """The idle part of all ranks inside the makespan: `1 - busy / (num_ranks * makespan)`."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)

    @cached_property
    def span_bubble_fraction(self) -> float:
        """`1 - busiest rank / longest first-start-to-last-end of a rank`: the zero-bubble papers' measure."""
        spans = (end.max() - start.min() for start, end in zip(self.start, self.end, strict=True) if start.size)
        return 1.0 - max(self.busy) / float(max(spans))

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank: most stage activations alive at once, each from the start of its F to the end of its B or W."""
        peaks = []
        for row in self.schedule:
            kind = row.table[:, 1]
            alive = np.cumsum((kind == Kind.F).astype(np.int64) - np.isin(kind, (Kind.B, Kind.W)))
            peaks.append(int(alive.max(initial=0)))
        return tuple(peaks)
