"""A timeline: when each action ran. The simulator makes one, and so can a measured run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Edge
from autofunc.schedule.footprint.live import peak_held
from autofunc.schedule.ir import Kind, Schedule, Table

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """How long one action of one stage takes: scalars, or one value per stage. A full backward takes `I + W`.

    All in one unit of the user's choice.

    Args:
        F: forward.
        I: backward of the input.
        W: backward of the weights.
        comm: how long one transfer occupies the wire between two ranks, which has room for one in each direction; or by
            (sending stage, receiving stage), where what is not listed is free.
        latency: from the end of a transfer until its value can be read.
        overlap: the part of `comm` that runs beside computation; for the rest the sending rank stands still.
        spread: how much computations of one kind and stage differ, as a fraction of their time (one standard deviation).
            Only `expected_makespan` looks at it.
    """

    F: float | Sequence[float] = 1.0
    I: float | Sequence[float] = 1.0  # noqa: E741 - the field's own name
    W: float | Sequence[float] = 1.0
    comm: float | Mapping[tuple[int, int], float] = 0.0
    latency: float = 0.0
    overlap: float = 1.0
    spread: float = 0.0

    def table(self, num_stages: int) -> Times:
        """The time of every kind of computation of every stage: float64 of shape (4, num_stages), rows F, B, I, W."""
        f, i, w = (np.broadcast_to(np.asarray(cost, np.float64), num_stages) for cost in (self.F, self.I, self.W))
        return np.stack((f, i + w, i, w))

    def durations(self, actions: Table, num_stages: int) -> Times:
        """The time each action of a table takes its rank."""
        is_compute = actions[:, 1] <= Kind.W
        kind, stage = np.where(is_compute, actions[:, 1], 0), actions[:, 0]
        return np.where(is_compute, self.table(num_stages)[kind, stage], 0.0)

    def transfer(self, sender: int, receiver: int) -> float:
        """How long a value occupies the edge between two stages."""
        return self.comm.get((sender, receiver), 0.0) if isinstance(self.comm, Mapping) else self.comm

    def scaled(self, factor: float) -> Costs:
        """The same costs with every computation `factor` times as long: a rank's costs times 1/v are a stage's."""
        f, i, w = (np.multiply(cost, factor).tolist() for cost in (self.F, self.I, self.W))
        return Costs(f, i, w, self.comm, self.latency, self.overlap, self.spread)

    def check(self, num_stages: int) -> None:
        """Refuse costs that do not fit a number of stages.

        Raises:
            ScheduleError: for a wrong number of values, a negative one, or stages whose every action is free.
        """
        for name in ("F", "I", "W", "comm", "latency"):
            given = getattr(self, name)
            value = np.asarray(list(given.values()) if isinstance(given, Mapping) else given, dtype=np.float64)
            per_stage = name in ("F", "I", "W")
            if value.ndim and not isinstance(given, Mapping) and not (per_stage and value.shape == (num_stages,)):
                expected = "a number" + (f", or one for each of {num_stages} stages" if per_stage else "")
                raise ScheduleError(f"Costs.{name} has shape {value.shape}; expected {expected}")
            if (value < 0).any() or not np.isfinite(value).all():
                raise ScheduleError(f"Costs.{name}={given}: a time cannot be negative or without bound")
        if not 0.0 <= self.spread < np.inf:
            raise ScheduleError(f"Costs.spread={self.spread}: expected a fraction, 0 or more")
        if not 0.0 <= self.overlap <= 1.0:
            raise ScheduleError(f"Costs.overlap={self.overlap}: expected a fraction, from 0 to 1")
        for edge in self.comm if isinstance(self.comm, Mapping) else ():
            if not all(0 <= stage < num_stages for stage in edge):
                raise ScheduleError(f"Costs.comm names the edge {edge}; there are stages 0 to {num_stages - 1}")
        if not any(np.any(np.asarray(getattr(self, name))) for name in ("F", "I", "W")):
            raise ScheduleError("Costs: F, I and W are all 0, so nothing takes any time")


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each action of a schedule starts and ends: one array per rank, in the order of its row."""

    schedule: Schedule
    start: tuple[Times, ...] = field(repr=False)
    end: tuple[Times, ...] = field(repr=False)
    label: str = ""  # for pictures, where the schedule's name does not say enough: "measured"
    edges: tuple[Edge, ...] | None = field(default=None, repr=False)  # between stages; None: a chain
    arrived: tuple[Times, ...] | None = field(default=None, repr=False)  # when all that an action reads was there, if known

    @cached_property
    def _computing(self) -> tuple[npt.NDArray[np.bool_], ...]:
        return tuple(row.table[:, 1] <= Kind.W for row in self.schedule)

    @cached_property
    def _spans(self) -> tuple[tuple[float, float], ...]:
        """Of each rank that computes: its first start and last end."""
        rows = zip(self._computing, self.start, self.end, strict=True)
        return tuple((float(start[mask].min()), float(end[mask].max())) for mask, start, end in rows if mask.any())

    @property
    def origin(self) -> float:
        """The first start of a computation."""
        return min(start for start, _ in self._spans)

    @cached_property
    def makespan(self) -> float:
        """From the first start of a computation to the last end of one."""
        return max(end for _, end in self._spans) - self.origin

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, the time spent computing."""
        rows = zip(self._computing, self.start, self.end, strict=True)
        return tuple(float((end - start)[compute].sum()) for compute, start, end in rows)

    @cached_property
    def bubble_fraction(self) -> float:
        """The idle part of all ranks inside the makespan: `1 - busy / (num_ranks * makespan)`."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)

    @cached_property
    def span_bubble_fraction(self) -> float:
        """`1 - busiest rank / longest first-start-to-last-end of a rank`: the zero-bubble papers' measure."""
        return 1.0 - max(self.busy) / self.longest_span

    @cached_property
    def longest_span(self) -> float:
        """The longest time from a rank's first start to its last end."""
        return max(end - start for start, end in self._spans)

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank: most stage activations alive at once, each from the start of its F to the end of its B or W."""
        each = [1.0] * self.schedule.num_stages
        return tuple(int(peak) for peak in peak_held(self.schedule, each, each))
