"""Turn the clocks of profiled steps into a timeline of all ranks."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from autofunc.runtime.executor import Clock
from autofunc.schedule import Edge, Schedule, Timeline

Times = npt.NDArray[np.float64]
"""Shape (2, number of ops)."""


class Profiled(NamedTuple):
    """One profiled step of this process's ranks."""

    schedule: Schedule  # lowered
    edges: Sequence[Edge]
    clocks: dict[int, Clock]  # by rank


def measured_timeline(run_once: Callable[[], Profiled], group: dist.ProcessGroup | None, steps: int) -> Timeline:
    """Run a step that is not measured and then some that are; the timeline of the one of median length, in milliseconds.

    Args:
        run_once: runs one profiled step.
        group: all pp ranks; None when they are in this process.
        steps: how many to measure.
    """
    timelines = []
    for _ in range(steps + 1):
        if group is not None:
            dist.all_reduce(torch.zeros(1), group=group)  # all ranks begin together
        began = time.perf_counter()
        step = run_once()
        rows = _of_all_ranks(step.clocks, began, group)
        start, end = (tuple(rows[rank][which] for rank in range(step.schedule.num_ranks)) for which in (0, 1))
        timelines.append(Timeline(step.schedule, start, end, label="measured", edges=tuple(step.edges)))
    return sorted(timelines[1:], key=lambda timeline: timeline.makespan)[steps // 2]


def _of_all_ranks(clocks: dict[int, Clock], began: float, group: dist.ProcessGroup | None) -> dict[int, Times]:
    """(starts, ends) of every rank's ops in milliseconds, on every process.

    Processes of one machine share its clock; of several, each counts from when the barrier let it go.
    """
    local = {rank: np.array([clock.start, clock.end]) for rank, clock in clocks.items()}
    gathered: list[Any] = [(platform.node(), began, local)]
    if group is not None:
        gathered = [None] * group.size()
        dist.all_gather_object(gathered, (platform.node(), began, local), group=group)
    one_machine = len({machine for machine, _, _ in gathered}) == 1
    earliest = min(begun for _, begun, _ in gathered)
    found = {}
    for _, begun, part in gathered:
        origin = earliest if one_machine else begun
        found.update({rank: (rows - origin) * 1e3 for rank, rows in part.items()})
    return found
