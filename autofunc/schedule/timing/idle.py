"""Why ranks are idle: no work, waiting for other ranks' results, or waiting for the wire."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autofunc.schedule.ir import Kind
from autofunc.schedule.laws.network import build_network
from autofunc.schedule.laws.walk import Pace, walk
from autofunc.schedule.timing.timeline import Timeline


class Idle(NamedTuple):
    """A rank's idle time inside the makespan, in the timeline's unit; the three parts add up to all of it."""

    dependency: float  # due to the order of actions: remains even if transfers were free and ranks had equal work
    communication: float  # added to the makespan by transfers, and by what ranks do between computations
    imbalance: float  # how much less this rank computes than the busiest one

    @property
    def total(self) -> float:
        """All idle time of the rank."""
        return self.dependency + self.communication + self.imbalance


def explain_idle(timeline: Timeline) -> tuple[Idle, ...]:
    """Split the idle time of every rank into its causes.

    The same actions, with the same durations, run again with free transfers. What this takes off the makespan was
    communication. No schedule can end before the busiest rank has done its work, so the work a rank has less is
    imbalance. The rest is dependency. None of the three is negative.

    Args:
        timeline: simulated or measured.
    """
    schedule = timeline.schedule
    network = build_network(schedule, timeline.edges)
    computing = network.table[:, 1] <= Kind.W
    duration = np.where(computing, np.concatenate(timeline.end) - np.concatenate(timeline.start), 0.0)
    free = np.zeros(len(network.crossings))
    start, end, _ = walk(network, Pace(duration, free, 0.0, free))
    without_transfers = min(Timeline(schedule, start, end).makespan, timeline.makespan)
    busiest = min(max(timeline.busy), without_transfers)
    return tuple(
        Idle(without_transfers - busiest, timeline.makespan - without_transfers, busiest - busy) for busy in timeline.busy
    )
