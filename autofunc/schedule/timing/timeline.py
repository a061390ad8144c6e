"""A timeline: when each action ran, simulated or measured."""

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
    """A slice of an action that ran interleaved with another on its rank."""

    position: int  # of the action in its row
    start: float
    end: float
    waits: bool = False  # True if it only waited for other processes that compute the stage


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each action of a schedule starts and ends: one array per rank, in the order of its row.

    In an overlapped pair that ran interleaved, F is given the time its turns took, and B the rest: start and end of the
    pair are right, and `turns` holds the details.
    """

    schedule: Schedule
    start: tuple[Times, ...] = field(repr=False)
    end: tuple[Times, ...] = field(repr=False)
    label: str = ""  # added to the schedule's name in pictures, such as "measured"
    edges: tuple[Edge, ...] | None = field(default=None, repr=False)  # between stages; None: a chain
    arrived: tuple[Times, ...] | None = field(default=None, repr=False)  # when an action's inputs had arrived, if known
    turns: tuple[tuple[Turn, ...], ...] | None = field(default=None, repr=False)  # by rank, in order: of overlapped pairs

    @cached_property
    def _computing(self) -> tuple[npt.NDArray[np.bool_], ...]:
        return tuple(row.table[:, 1] <= Kind.W for row in self.schedule)

    @cached_property
    def _spans(self) -> tuple[tuple[float, float], ...]:
        """The first start and last end of each rank that computes."""
        rows = zip(self._computing, self.start, self.end, strict=True)
        return tuple((float(start[mask].min()), float(end[mask].max())) for mask, start, end in rows if mask.any())

    @property
    def origin(self) -> float:
        """The start of the first computation."""
        return min(start for start, _ in self._spans)

    @cached_property
    def makespan(self) -> float:
        """Time from the start of the first computation to the end of the last."""
        return max(end for _, end in self._spans) - self.origin

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, the time spent computing."""
        rows = zip(self._computing, self.start, self.end, strict=True)
        return tuple(float((end - start)[compute].sum()) for compute, start, end in rows)

    @cached_property
    def bubble_fraction(self) -> float:
        """The idle fraction of all ranks inside the makespan: `1 - busy / (num_ranks * makespan)`."""
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
        """Most activations alive on a rank, in microbatches of the whole rank: comparable over schedules."""
        return max(self.peak_activations) * self.schedule.num_ranks / self.schedule.num_stages

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank: most stage activations alive at once, each from the start of its F to the end of its B or W."""
        each = [1.0] * self.schedule.num_stages
        return tuple(int(peak) for peak in peak_held(self.schedule, each, each))
