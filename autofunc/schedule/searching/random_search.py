"""Search for a schedule that fits given costs and a given memory.

The best named schedule that fits is where it begins. Then policies (see `policy.py`) are drawn and changed at random; the
best is kept, so the result is never worse than the best named schedule, and only improves with time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from autofunc.errors import ScheduleError, one_of
from autofunc.schedule.footprint.live import Memory, peak_held
from autofunc.schedule.ir import Action, Kind, Schedule
from autofunc.schedule.named.registry import GENERATORS, build
from autofunc.schedule.placement import loop, v_shape
from autofunc.schedule.searching.bound import lower_bound as problem_bound
from autofunc.schedule.searching.policy import NEVER, Policy, Problem, Rules, run_policy
from autofunc.schedule.text import from_actions
from autofunc.schedule.timing.simulation import simulate
from autofunc.schedule.timing.timeline import Costs, Timeline

Objective = Literal["makespan", "span"]

Progress = Callable[[float, float], None]
"""Told (elapsed seconds, best value so far) while the search goes on."""


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
    """Find a schedule for a chain of stages, unequal ones too.

    Args:
        costs: times of the stages and of transfers.
        num_ranks: pp ranks.
        num_microbatches: microbatches of a step.
        memory_limit: the most a rank may hold, or one value per rank: stage activations (each from the start of F to the
            end of W), or bytes of residuals if `memory` is given. No limit by default.
        memory: bytes that F keeps for I, and I for W, by stage; its other figures are not counted here.
        stages_per_rank: by default as many as the costs have values for, else 1.
        objective: "makespan"; or "span", the longest time from a rank's first start to its last end, which the zero-bubble
            papers minimise (ranks then begin the next step at different times).
        time_limit_s: of trying, after the named schedules were looked at; ends earlier when nothing can be better.
        seed: of the random choices.
        on_progress: told (elapsed seconds, best value) now and then.

    Raises:
        ScheduleError: for numbers that do not fit each other, or a limit below what one microbatch needs.
    """
    started = told = time.monotonic()
    problems = _problems(costs, num_ranks, num_microbatches, memory_limit, memory, stages_per_rank, objective)
    best = _best_named(problems, costs, objective)
    climbs = [_Climb(problem, random.Random(seed)) for problem in problems]
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
    """A value of the objective that no schedule of these stages can go below, in a loop or in a V; see `search`."""
    problems = _problems(costs, num_ranks, num_microbatches, memory_limit, memory, stages_per_rank, objective)
    return min(map(problem_bound, problems))


def value_of(timeline: Timeline, objective: Objective) -> float:
    """What a search minimises."""
    return timeline.makespan if objective == "makespan" else timeline.longest_span


def _stages_per_rank(costs: Costs, num_ranks: int) -> int:
    """As many as the costs have values for."""
    lengths = {len(cost) for cost in (costs.F, costs.I, costs.W) if np.ndim(cost)}  # type: ignore[arg-type]
    if not lengths:
        return 1
    if len(lengths) > 1 or min(lengths) % num_ranks or not min(lengths):
        raise ScheduleError(f"costs are given for {sorted(lengths)} stages; expected a multiple of num_ranks={num_ranks}")
    return lengths.pop() // num_ranks


def _problems(
    costs: Costs,
    num_ranks: int,
    num_microbatches: int,
    memory_limit: float | Sequence[float] | None,
    memory: Memory | None,
    stages_per_rank: int | None,
    objective: Objective,
) -> list[Problem]:
    """One for each placement: stages in a loop, and in a V."""
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
    """The numbers, checked and spread over stages and ranks."""
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


def _best_named(problems: list[Problem], costs: Costs, objective: Objective) -> Timeline:
    """The best named schedule that keeps within the room there is."""
    some = problems[0]
    # one microbatch at a time: slow, but whatever limit has room for one has room for this
    best = simulate(_serial(some), costs)
    for candidate in named_candidates(some.num_ranks, some.num_microbatches, some.num_stages // some.num_ranks):
        problem = next(problem for problem in problems if problem.placement == candidate.placement)
        held = peak_held(candidate, problem.activation, problem.weight_activation)
        if all(most <= room for most, room in zip(held, problem.room, strict=True)):
            best = min(best, simulate(candidate, costs), key=lambda timeline: value_of(timeline, objective))
    return best


def named_candidates(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Iterator[Schedule]:
    """Every named schedule that exists for these numbers."""
    for name, generator in GENERATORS.items():
        if generator.fits(num_ranks, num_microbatches, stages_per_rank):
            yield build(name, num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank)


_PATIENCE = 1000
"""Changes without an improvement after which a climb begins anew, elsewhere."""


def _serial(problem: Problem) -> Schedule:
    rows: list[list[Action]] = [[] for _ in range(problem.num_ranks)]
    for microbatch in range(problem.num_microbatches):
        for stage in range(problem.num_stages):
            rows[problem.placement[stage]].append(Action(stage, Kind.F, microbatch))
        for stage in reversed(range(problem.num_stages)):
            rows[problem.placement[stage]].append(Action(stage, Kind.B, microbatch))
    return from_actions(rows, "one_at_a_time")


class _Climb:
    """Random changes to a policy; those that do no harm are kept."""

    def __init__(self, problem: Problem, rng: random.Random) -> None:
        self.problem, self.rng = problem, rng
        self._forget()

    def _forget(self) -> None:
        self.current: Policy | None = None
        self.value, self.stale = NEVER, 0

    def step(self, best: float) -> list[list[Action]] | None:
        """Try one policy; returns its actions if they look better than `best`."""
        if self.stale > _PATIENCE:
            self._forget()
        start_anew = self.current is None or self.rng.random() < 0.1
        policy = self._draw() if start_anew or self.current is None else self._change(self.current)
        outcome = run_policy(self.problem, policy, self.value)
        self.stale += 1
        if outcome is None:
            return None
        if outcome.value < self.value * (1 - 1e-9):
            self.stale = 0
        self.current, self.value = policy, outcome.value
        return outcome.rows if outcome.value < best * (1 - 1e-12) else None

    def _draw(self) -> Policy:
        """One of the shapes that known schedules have."""
        rng, m, last = self.rng, self.problem.num_microbatches, self.problem.num_stages
        depth = rng.choice((0, 1, 2, m))
        in_flight = tuple(min(depth * (last - 1 - stage) + 1, m) for stage in range(last))
        rules = Rules(
            patience=rng.choice((0.0, 0.3, 0.6, 1.0)),
            fit=rng.choice((0.0, 0.3, 0.6, 1.0)),
            early=rng.choice((0, 1, 2, m)),
            late=m,
            switch=rng.choice((0, m // 2, max(m - last, 0), m)),
        )
        return Policy(in_flight, (rules,) * self.problem.num_ranks)

    def _change(self, policy: Policy) -> Policy:
        """A few of its numbers changed."""
        rng, m = self.rng, self.problem.num_microbatches
        in_flight, rules = list(policy.in_flight), list(policy.rules)
        for _ in range(rng.choice((1, 1, 2, 3))):
            rank = rng.randrange(len(rules))
            what = rng.randrange(7)
            if what < 2:
                stage = rng.randrange(len(in_flight))
                in_flight[stage] = min(max(in_flight[stage] + rng.choice((-2, -1, 1, 2)), 1), m)
            elif what == 2:
                rules[rank] = rules[rank]._replace(patience=rng.random())
            elif what == 3:
                rules[rank] = rules[rank]._replace(fit=1.2 * rng.random())
            elif what == 4:
                rules[rank] = rules[rank]._replace(early=rng.choice((0, 1, 2, 3, rng.randrange(m + 1), m)))
            elif what == 5:
                rules[rank] = rules[rank]._replace(late=rng.choice((m, rng.randrange(m + 1))))
            else:
                change = rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
                rules[rank] = rules[rank]._replace(switch=min(max(rules[rank].switch + change, 0), m))
        return Policy(tuple(in_flight), tuple(rules))
