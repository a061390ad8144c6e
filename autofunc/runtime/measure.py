"""Timelines of all ranks from the clocks of profiled steps."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.engine import Microbatch
from autofunc.runtime.observe import Clock, LiveBytes
from autofunc.runtime.plan import Plan
from autofunc.runtime.program import Program
from autofunc.runtime.step import OneByOne, Timer
from autofunc.schedule import Timeline, Turn

Result = TypeVar("Result")

Times = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], tuple[Turn, ...]]
"""Starts and ends of a rank's ops, and the turns of interleaved ones."""


class Watch(Timer):
    """Attaches a clock to every local rank of a step, and remembers the clocks and the plan."""

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = {}
        self.plan: Plan | None = None

    def __call__(self, plan: Plan, program: Program, microbatches: Sequence[Microbatch]) -> list[Clock]:
        """See `step.Observe`."""
        self.plan = plan
        self.clocks[program.rank] = clock = Clock(len(program.ops), plan.device)
        return [clock]


def observed_step(
    run: Callable[[Watch], Result], group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Result, Timeline]:
    """Run one step; return its result and the timeline of all actions, in milliseconds. All processes of the group call it.

    Args:
        run: runs one step under a watch.
        group: of all pp ranks; None if they are in this process.
        device: that the step computes on.
    """
    if group is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # a barrier: all ranks begin together
    began, watch = time.perf_counter(), Watch()
    result = run(watch)
    assert watch.plan is not None
    schedule, edges = watch.plan.schedule, watch.plan.boundaries.edges()
    rows = _of_all_ranks(watch.clocks, began, group)
    start, end, turns = zip(*(rows[rank] for rank in range(schedule.num_ranks)), strict=True)
    return result, Timeline(schedule, start, end, label="measured", edges=edges, turns=turns if any(turns) else None)


def measured_timeline(
    run: Callable[[Watch], Any], group: dist.ProcessGroup | None, device: torch.device, steps: int
) -> Timeline:  # fmt: skip
    """Run one warm-up step and then measured ones; return the timeline of the step of median length, in milliseconds.

    Args:
        run: see `observed_step`.
        group: see `observed_step`.
        device: see `observed_step`.
        steps: number of measured steps.
    """
    timelines = [observed_step(run, group, device)[1] for _ in range(steps + 1)]
    return sorted(timelines[1:], key=lambda timeline: timeline.makespan)[steps // 2]


class Scales(OneByOne):
    """Measures live bytes on every local rank during a step, action by action."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self.ranks: dict[int, LiveBytes] = {}

    def __call__(self, plan: Plan, program: Program, microbatches: Sequence[Microbatch]) -> list[LiveBytes]:
        """See `step.Observe`."""
        batch = [tensor for microbatch in microbatches for tensor in microbatch.tensors]
        constants = [tensor for functions in plan.functions.values() for tensor in functions.constants]
        self.ranks[program.rank] = scale = LiveBytes(len(program.ops), [*self._params, *batch, *constants])
        return [scale]


Key = TypeVar("Key", bound=Hashable)


def of_all(local: Mapping[Key, Any], group: dist.ProcessGroup | None) -> dict[Key, Any]:
    """Merge every process's own entries, on every process."""
    parts: list[Any] = [local]
    if group is not None:
        parts = [None] * group.size()
        dist.all_gather_object(parts, local, group=group)
    return {key: value for part in parts for key, value in part.items()}


def _of_all_ranks(clocks: dict[int, Clock], began: float, group: dist.ProcessGroup | None) -> dict[int, Times]:
    """Return starts, ends and turns of every rank's ops in milliseconds, on every process.

    Processes of one machine share its clock; on several machines each counts from its exit from the barrier.
    """
    local = {rank: clock.times() for rank, clock in clocks.items()}
    gathered: list[Any] = [(platform.node(), began, local)]
    if group is not None:
        gathered = [None] * group.size()
        dist.all_gather_object(gathered, (platform.node(), began, local), group=group)
    one_machine = len({machine for machine, _, _ in gathered}) == 1
    earliest = min(begun for _, begun, _ in gathered)
    found = {}
    for _, begun, part in gathered:
        origin = earliest if one_machine else begun
        found.update({rank: _since(origin, *times) for rank, times in part.items()})
    return found


def _since(origin: float, start: list[float], end: list[float], turns: Sequence[Turn]) -> Times:
    """Convert seconds of a clock to milliseconds since the origin."""
    moved = (turn._replace(start=(turn.start - origin) * 1e3, end=(turn.end - origin) * 1e3) for turn in turns)
    return (np.array(start) - origin) * 1e3, (np.array(end) - origin) * 1e3, tuple(moved)
