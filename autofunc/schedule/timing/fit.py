"""From a measured timeline to the costs that would have made it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Kind
from autofunc.schedule.laws.network import Network, build_network
from autofunc.schedule.timing.costs import Costs
from autofunc.schedule.timing.timeline import Timeline


def costs_of(timeline: Timeline) -> Costs:
    """Costs of every stage, in the timeline's unit: means over microbatches, because a step is as long as their sum.

    `spread` is how much microbatches differ, the median over stages and kinds. `comm` is the median time from the end of an
    action to the start of one on another rank that waited for it. A stage whose backward is never split into I and W has
    all of it as W.

    Args:
        timeline: of a whole step, with forwards and backwards of every stage.

    Raises:
        ScheduleError: when a stage has no forward or no backward.
    """
    schedule = timeline.schedule
    network = build_network(schedule, timeline.edges)
    start, end = np.concatenate(timeline.start), np.concatenate(timeline.end)
    times: dict[Literal["F", "I", "W"], list[float]] = {"F": [], "I": [], "W": []}
    spreads: list[float] = []
    for stage in range(schedule.num_stages):
        means = {}
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
            mine = (network.table[:, 0] == stage) & (network.table[:, 1] == kind)
            lengths = (end - start)[mine]
            means[kind] = float(np.mean(lengths)) if len(lengths) else None
            if len(lengths) > 1 and means[kind]:
                spreads.append(float(np.std(lengths, ddof=1)) / float(np.mean(lengths)))
        forward, both, first, second = means.values()
        if forward is None or (both is None and (first is None or second is None)):
            raise ScheduleError(f"the timeline has no forward and backward of stage {stage}, so it has no costs")
        split = first is not None and second is not None
        times["F"].append(forward)
        times["I"].append(first if split and first is not None else 0.0)
        times["W"].append(second if split and second is not None else both or 0.0)
    spread = float(np.median(spreads)) if spreads else 0.0
    return Costs(times["F"], times["I"], times["W"], comm=_transfer_time(network, start, end), spread=spread)


def _transfer_time(network: Network, start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]) -> float:
    """How long after it was made a value was read by a rank that had nothing else to do."""
    computing = np.flatnonzero(network.table[:, 1] <= Kind.W)
    rank = np.searchsorted(network.first, computing, side="right")
    same_rank = np.append(False, rank[1:] == rank[:-1])
    before = np.full(len(start), -np.inf)
    before[computing[same_rank]] = end[computing[:-1][same_rank[1:]]]
    delays = []
    for crossing in network.crossings:
        maker, reader = crossing.bundle.maker, crossing.bundle.reader
        waited = before[reader] < end[maker]  # the reader was idle when the value was made
        delays.append((start[reader] - end[maker])[waited])
    found = np.concatenate(delays) if delays else np.empty(0)
    found = found[np.isfinite(found)]
    return max(float(np.median(found)), 0.0) if len(found) else 0.0
