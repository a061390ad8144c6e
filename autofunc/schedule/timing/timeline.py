"""A timeline: when each action ran. The simulator makes one, and so can a measured run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autofunc.schedule.effects import Edge
from autofunc.schedule.footprint.live import peak_held
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.laws.walk import Times


class Turn(NamedTuple):
    """A part of an action that ran side by side with another: the two took turns."""

    position: int  # of the action in its row
    start: float
    end: float
    waits: bool = False  # whether it only waited for what other processes that compute the stage had to send


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each action of a schedule starts and ends: one array per rank, in the order of its row.

    Of an overlapped pair that ran side by side the F has as much time as its turns took, and the B the rest: the ends of
    both together are right, and `turns` tells the rest.
    """

    schedule: Schedule
    start: tuple[Times, ...] = field(repr=False)
    end: tuple[Times, ...] = field(repr=False)
    label: str = ""  # for pictures, where the schedule's name does not say enough: "measured"
    edges: tuple[Edge, ...] | None = field(default=None, repr=False)  # between stages; None: a chain
    arrived: tuple[Times, ...] | None = field(default=None, repr=False)  # when all that an action reads was there, if known
    turns: tuple[tuple[Turn, ...], ...] | None = field(default=None, repr=False)  # by rank, of overlapped pairs; in order

    @cached_property
    def _computing(self) -> tuple[npt.NDArray[np.bool_], ...]:
        return tuple(row.table[:, 1] <= Kind.W for row in self.schedule)

    @cached_property
    def _spans(self) -> tuple[tuple[float, float], ...]:
        """The first start and last end of each rank that computes; ranks that do not are left out."""
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

    @property
    def peak_microbatches(self) -> float:
        """Most microbatches whose activations a rank holds at once, of all its stages: the same unit in every schedule."""
        return max(self.peak_activations) * self.schedule.num_ranks / self.schedule.num_stages

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank: most stage activations alive at once, each from the start of its F to the end of its B or W."""
        each = [1.0] * self.schedule.num_stages
        return tuple(int(peak) for peak in peak_held(self.schedule, each, each))
