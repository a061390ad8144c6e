"""A scheduling problem, as a search and its bounds see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.footprint.memory import Memory
from autofunc.schedule.ir import Kind
from autofunc.schedule.placement import loop, v_shape
from autofunc.schedule.timing.costs import Costs

Objective = Literal["makespan", "span"]
"""What to minimise: the whole step, or the longest time from a rank's first start to its last end."""

NEVER = float("inf")


@dataclass(frozen=True)
class Problem:
    """A chain of stages on ranks to schedule, with costs and room for activations."""

    placement: tuple[int, ...]  # stage -> rank
    num_microbatches: int
    costs: Costs
    room: tuple[float, ...]  # per rank: the most that may be alive
    activation: tuple[float, ...]  # per stage: what F keeps for I, in the unit of `room`
    weight_activation: tuple[float, ...]  # per stage: what I keeps for W, in the unit of `room`
    measure_span: bool = False  # minimise the longest span of a rank, not the makespan

    @property
    def num_stages(self) -> int:
        """Number of stages on all ranks together."""
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        """Number of pp ranks."""
        return len(self.room)

    @cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank, last first: stages nearer to the loss take precedence."""
        ranks: list[list[int]] = [[] for _ in self.room]
        for stage in reversed(range(self.num_stages)):
            ranks[self.placement[stage]].append(stage)
        return tuple(map(tuple, ranks))

    @cached_property
    def durations(self) -> tuple[list[float], list[float], list[float]]:
        """Times of F, `I` and W by stage, overheads before F and `I` included; W has none, as it may merge with its `I`."""
        table = self.costs.table(self.num_stages)
        table[[Kind.F, Kind.I]] += self.costs.between
        for stage in range(self.num_stages):
            table[Kind.F, stage] += self._crosses(stage - 1, stage) * self.costs.receive
            table[Kind.I, stage] += self._crosses(stage, stage + 1) * self.costs.receive
        return table[Kind.F].tolist(), table[Kind.I].tolist(), table[Kind.W].tolist()

    @cached_property
    def transfers(self) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """(time until the value can be read, time the sender is held up) of what each stage sends forward, and back."""
        last = self.num_stages - 1
        forward = [self._transfer(stage, stage + 1) for stage in range(last)] + [(0.0, 0.0)]
        return forward, [(0.0, 0.0)] + [self._transfer(stage, stage - 1) for stage in range(1, last + 1)]

    def _transfer(self, source: int, target: int) -> tuple[float, float]:
        if not self._crosses(source, target):
            return 0.0, 0.0
        on_the_wire = self.costs.transfer(source, target)
        return on_the_wire + self.costs.latency, self.costs.send + on_the_wire * (1 - self.costs.overlap)

    def _crosses(self, one: int, other: int) -> bool:
        """Return whether two stages exist and are on different ranks."""
        exist = min(one, other) >= 0 and max(one, other) < self.num_stages
        return exist and self.placement[one] != self.placement[other]

    @cached_property
    def work(self) -> tuple[float, ...]:
        """Per rank, the time of all its computations."""
        times = np.sum(self.durations, axis=0) * self.num_microbatches
        return tuple(float(sum(times[stage] for stage in stages)) for stages in self.stages_of)


def problems_of(
    costs: Costs,
    num_ranks: int,
    num_microbatches: int,
    memory_limit: float | Sequence[float] | None,
    memory: Memory | None,
    stages_per_rank: int | None,
    objective: Objective,
) -> list[Problem]:
    """Make the problem that `search` is asked, once for each placement: stages in a loop, and in a V.

    Raises:
        ScheduleError: for numbers that do not fit together, or a limit below what one microbatch needs.
    """
    for name, number in (("num_ranks", num_ranks), ("stages_per_rank", stages_per_rank)):
        if number is not None and number < 1:
            raise ScheduleError(f"{name}={number}, expected at least 1")
    if objective not in ("makespan", "span"):
        raise ScheduleError(f"objective={objective!r}; {one_of(objective, ('makespan', 'span'))}")
    per_rank = stages_per_rank or _stages_per_rank(costs, num_ranks)
    costs.check(per_rank * num_ranks)
    return [
        _problem(costs, placement, num_ranks, num_microbatches, memory_limit, memory, objective)
        for placement in dict.fromkeys((loop(num_ranks, per_rank), v_shape(num_ranks, per_rank)))
    ]


def _problem(
    costs: Costs,
    placement: tuple[int, ...],
    num_ranks: int,
    num_microbatches: int,
    memory_limit: float | Sequence[float] | None,
    memory: Memory | None,
    objective: Objective,
) -> Problem:
    """Check the numbers and broadcast them over stages and ranks."""
    if num_microbatches < 1:
        raise ScheduleError(f"num_microbatches={num_microbatches}, expected at least 1")
    memory = memory or Memory(residuals=1.0, weight_residuals=1.0)
    memory.check(len(placement))
    room = np.asarray(NEVER if memory_limit is None else memory_limit, np.float64)
    if room.ndim and room.shape != (num_ranks,):
        raise ScheduleError(f"memory_limit has {room.size} values; expected one, or one for each of {num_ranks} ranks")
    problem = Problem(
        placement,
        num_microbatches,
        costs,
        tuple(np.broadcast_to(room, num_ranks).tolist()),
        tuple(memory.per_stage("residuals", len(placement)).tolist()),
        tuple(memory.per_stage("weight_residuals", len(placement)).tolist()),
        measure_span=objective == "span",
    )
    for rank, stages in enumerate(problem.stages_of):
        needed = sum(problem.activation[stage] for stage in stages)
        if not problem.room[rank] >= needed:
            raise ScheduleError(
                f"memory_limit={problem.room[rank]:g} on rank {rank}: one microbatch alone needs {needed:g} there"
            )
    return problem


def _stages_per_rank(costs: Costs, num_ranks: int) -> int:
    """Return how many stages per rank the costs have values for; 1 if all are scalars."""
    lengths = {len(cost) for cost in (costs.F, costs.I, costs.W) if np.ndim(cost)}  # type: ignore[arg-type]
    if not lengths:
        return 1
    if len(lengths) > 1 or min(lengths) % num_ranks or not min(lengths):
        raise ScheduleError(f"costs are given for {sorted(lengths)} stages; expected a multiple of num_ranks={num_ranks}")
    return lengths.pop() // num_ranks
