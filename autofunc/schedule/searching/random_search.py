"""Random search for a schedule that suits given costs and memory.

The search starts from the best named schedule that fits. Then policies (see `policy.py`) are drawn and changed at random;
the best so far is kept, so the result is never worse than the best named schedule, and only improves with time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from autofunc.schedule.footprint.live import peak_held
from autofunc.schedule.footprint.memory import Memory
from autofunc.schedule.ir import Action, Kind, Schedule
from autofunc.schedule.named.registry import named_candidates
from autofunc.schedule.searching.bound import problem_bound
from autofunc.schedule.searching.climb import Climb
from autofunc.schedule.searching.problem import Objective, Problem, problems_of
from autofunc.schedule.text import from_actions
from autofunc.schedule.timing.costs import Costs
from autofunc.schedule.timing.simulation import simulate
from autofunc.schedule.timing.timeline import Timeline

Progress = Callable[[float, float], None]
"""Called with (elapsed seconds, best value so far) during the search."""


def search(
    costs: Costs,
    *,
    num_ranks: int,
    num_microbatches: int,
    memory_limit: float | Sequence[float] | None = None,
    memory: Memory | None = None,
    stages_per_rank: int | None = None,
    objective: Objective = "makespan",
    time_limit_s: float = 10.0,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Schedule:
    """Find a schedule for a chain of stages, which may be unequal.

    Args:
        costs: times of the stages and of transfers.
        num_ranks: pp ranks.
        num_microbatches: microbatches of a step.
        memory_limit: the most a rank may hold, one value for all or one per rank: stage activations (each from the start of
            F to the end of W), or bytes of residuals if `memory` is given. No limit by default.
        memory: bytes that F keeps for `I`, and `I` for W, by stage; other figures are ignored.
        stages_per_rank: by default as many as the costs have values for, or 1.
        objective: "makespan"; or "span", the longest time from a rank's first start to its last end, which the zero-bubble
            papers minimise (ranks then begin the next step at different times).
        time_limit_s: of the random search, after the named schedules; it ends earlier once nothing can be better.
        seed: of the random choices.
        on_progress: called with (elapsed seconds, best value), about ten times a second.

    Returns:
        The best schedule found, in compute form.

    Raises:
        ScheduleError: for numbers that do not fit together, or a limit below what one microbatch needs.
    """
    started = told = time.monotonic()
    problems = problems_of(costs, num_ranks, num_microbatches, memory_limit, memory, stages_per_rank, objective)
    best = _best_named(problems, costs, objective)
    climbs = [Climb(problem, random.Random(seed)) for problem in problems]
    bound = min(map(problem_bound, problems)) * (1 + 1e-9)
    while value_of(best, objective) > bound:
        now = time.monotonic()
        if now - started > time_limit_s:
            break
        if on_progress is not None and now - told > 0.1:
            told = now
            on_progress(now - started, value_of(best, objective))
        for climb in climbs:
            rows = climb.step(value_of(best, objective))
            if rows is not None:
                found = simulate(from_actions(rows, "searched"), costs)
                best = min(best, found, key=lambda timeline: value_of(timeline, objective))
    return best.schedule


def lower_bound(
    costs: Costs,
    *,
    num_ranks: int,
    num_microbatches: int,
    memory_limit: float | Sequence[float] | None = None,
    memory: Memory | None = None,
    stages_per_rank: int | None = None,
    objective: Objective = "makespan",
) -> float:
    """Return a bound on the objective that no schedule of these stages can beat, in a loop or in a V.

    Arguments and errors as for `search`; the unit is that of the costs.
    """
    problems = problems_of(costs, num_ranks, num_microbatches, memory_limit, memory, stages_per_rank, objective)
    return min(map(problem_bound, problems))


def value_of(timeline: Timeline, objective: Objective) -> float:
    """Return what a search minimises."""
    return timeline.makespan if objective == "makespan" else timeline.longest_span


def _best_named(problems: list[Problem], costs: Costs, objective: Objective) -> Timeline:
    """Find the best named schedule that fits the room of every rank."""
    some = problems[0]
    # one microbatch at a time: slow, but it fits any limit with room for one microbatch
    best = simulate(_serial(some), costs)
    for candidate in named_candidates(some.num_ranks, some.num_microbatches, some.num_stages // some.num_ranks):
        problem = next(problem for problem in problems if problem.placement == candidate.placement)
        held = peak_held(candidate, problem.activation, problem.weight_activation)
        if all(most <= room for most, room in zip(held, problem.room, strict=True)):
            best = min(best, simulate(candidate, costs), key=lambda timeline: value_of(timeline, objective))
    return best


def _serial(problem: Problem) -> Schedule:
    rows: list[list[Action]] = [[] for _ in range(problem.num_ranks)]
    for microbatch in range(problem.num_microbatches):
        for stage in range(problem.num_stages):
            rows[problem.placement[stage]].append(Action(stage, Kind.F, microbatch))
        for stage in reversed(range(problem.num_stages)):
            rows[problem.placement[stage]].append(Action(stage, Kind.B, microbatch))
    return from_actions(rows, "one_at_a_time")
