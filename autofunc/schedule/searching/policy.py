"""Run a pipeline by local rules and record what each rank did: the search's decoder.

Each rank takes the first of these that it can: an input gradient, a forward, a weight gradient. A policy decides when it
should rather wait, or clear away weight gradients first. The ideas are those of the heuristic of Qi et al., "Zero Bubble
Pipeline Parallelism", ICLR 2024, section 3.1; here they are numbers to search over, for any costs and placement.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

from autofunc.schedule.ir import Action, Kind
from autofunc.schedule.searching.problem import NEVER, Problem


class Rules(NamedTuple):
    """How one rank decides. Weight gradients wait for idle time, unless more than `early` of them are waiting (`late`,
    from the `switch`-th on)."""

    patience: float  # rather than start a forward, wait this part of it for an input gradient
    fit: float  # start a weight gradient if this part of it fits before the next forward or input gradient
    early: int
    late: int
    switch: int


@dataclass(frozen=True)
class Policy:
    """Rules of every rank, and how many microbatches of a stage may be between forward and input gradient."""

    in_flight: tuple[int, ...]  # per stage
    rules: tuple[Rules, ...]  # per rank


@dataclass
class _Rank:
    """The state of one rank during a run."""

    rules: Rules
    work_left: float
    actions_left: int
    actions: list[Action] = field(default_factory=list)
    last_end: float = 0.0
    free_at: float = 0.0
    first_start: float = NEVER
    alive: float = 0.0
    waiting: list[tuple[int, int]] = field(default_factory=list)  # (stage, microbatch) of weight gradients, in order
    done_weights: int = 0
    waits_until: float = 0.0  # while it waits: when it will look again


class Outcome(NamedTuple):
    """The result of running a policy."""

    rows: list[list[Action]]  # per rank
    value: float  # makespan, or the longest span: transfers of one edge are assumed not to queue


def run_policy(problem: Problem, policy: Policy, give_up_above: float = NEVER) -> Outcome | None:
    """Run a policy; return None if it runs out of room or cannot end by `give_up_above`."""
    return _Run(problem, policy, give_up_above).run()


class _Run:
    def __init__(self, problem: Problem, policy: Policy, give_up_above: float) -> None:
        self.problem, self.policy, self.limit = problem, policy, give_up_above
        m, count = problem.num_microbatches, problem.num_stages
        self.ranks = [
            _Rank(rules, work, 3 * m * len(stages))
            for rules, work, stages in zip(policy.rules, problem.work, problem.stages_of, strict=True)
        ]
        self.forwards, self.inputs = [0] * count, [0] * count  # done so far, by stage
        self.activation_at = [[0.0] * m] + [[NEVER] * m for _ in range(count - 1)]
        self.cotangent_at = [[NEVER] * m for _ in range(count)]
        self.queue: list[tuple[float, int]] = [(0.0, rank) for rank in range(problem.num_ranks)]

    def run(self) -> Outcome | None:
        """Let the next free rank act, until all are done."""
        while self.queue:
            now, number = heapq.heappop(self.queue)
            rank = self.ranks[number]
            if now < rank.free_at:
                continue  # it meant to look again, but got work earlier
            begun = 0.0 if rank.first_start == NEVER or not self.problem.measure_span else rank.first_start
            if now - begun + rank.work_left > self.limit * (1 + 1e-12):
                return None
            wake = self._act(now, number, rank)
            rank.waits_until = 0.0 if wake is None else wake
            if wake is not None and wake < NEVER:
                heapq.heappush(self.queue, (wake, number))
            elif wake is None and rank.actions_left:
                heapq.heappush(self.queue, (rank.free_at, number))
        if any(rank.actions_left for rank in self.ranks):
            return None
        spans = self.problem.measure_span
        value = max(rank.last_end - (rank.first_start if spans else 0.0) for rank in self.ranks)
        return Outcome([rank.actions for rank in self.ranks], value)

    def _act(self, now: float, number: int, rank: _Rank) -> float | None:
        """Start something and return None, or return when to look again."""
        rules, forward_time, weight_time = rank.rules, self.problem.durations[0], self.problem.durations[2]
        input_at, input_stage = self._next_input(now, number, rank)
        forward_at, forward_stage, blocked = self._next_forward(now, number, rank)
        backlog = len(rank.waiting) - rank.done_weights
        next_at = min(input_at, forward_at)
        if backlog > (rules.early if len(rank.waiting) < rules.switch else rules.late):
            self._weight(now, rank)
            return None
        if input_at <= now:
            self._input(now, number, rank, input_stage)
            return None
        if forward_at <= now:
            if input_at >= now + rules.patience * forward_time[forward_stage]:
                self._forward(now, number, rank, forward_stage)
                return None
            next_at = input_at
        if backlog and (
            blocked <= now
            or next_at == NEVER
            or next_at - now >= rules.fit * weight_time[rank.waiting[rank.done_weights][0]]
        ):
            self._weight(now, rank)
            return None
        return next_at

    def _next_input(self, now: float, number: int, rank: _Rank) -> tuple[float, int]:
        """Find when the next input gradient can start, and of which stage."""
        best, chosen = NEVER, -1
        for stage in self.problem.stages_of[number]:
            if self.inputs[stage] < self.forwards[stage]:
                ready = max(self.cotangent_at[stage][self.inputs[stage]], now)
                growth = self.problem.weight_activation[stage] - self.problem.activation[stage]
                if ready < best and (growth <= 0 or rank.alive + growth <= self.problem.room[number]):
                    best, chosen = ready, stage
        return best, chosen

    def _next_forward(self, now: float, number: int, rank: _Rank) -> tuple[float, int, float]:
        """Find when the next forward can start, of which stage, and when one that lacks room could."""
        best, chosen, blocked = NEVER, -1, NEVER
        for stage in self.problem.stages_of[number]:
            done = self.forwards[stage]
            if done == self.problem.num_microbatches or done - self.inputs[stage] >= self.policy.in_flight[stage]:
                continue
            ready = max(self.activation_at[stage][done], now)
            if rank.alive + self.problem.activation[stage] > self.problem.room[number]:
                blocked = min(blocked, ready)
            elif ready < best:
                best, chosen = ready, stage
        return best, chosen, blocked

    def _forward(self, now: float, number: int, rank: _Rank, stage: int) -> None:
        microbatch, end = self.forwards[stage], now + self.problem.durations[0][stage]
        self.forwards[stage] += 1
        rank.alive += self.problem.activation[stage]
        rank.first_start = min(rank.first_start, now)
        arrives, stands_still = self.problem.transfers[0][stage]
        if stage + 1 < self.problem.num_stages:
            self.activation_at[stage + 1][microbatch] = end + arrives
            self._wake(self.problem.placement[stage + 1], end + arrives)
        else:
            self.cotangent_at[stage][microbatch] = end
        self._did(rank, Action(stage, Kind.F, microbatch), now, end, stands_still)

    def _input(self, now: float, number: int, rank: _Rank, stage: int) -> None:
        microbatch, end = self.inputs[stage], now + self.problem.durations[1][stage]
        self.inputs[stage] += 1
        rank.alive += self.problem.weight_activation[stage] - self.problem.activation[stage]
        rank.waiting.append((stage, microbatch))
        arrives, stands_still = self.problem.transfers[1][stage]
        if stage:
            self.cotangent_at[stage - 1][microbatch] = end + arrives
            self._wake(self.problem.placement[stage - 1], end + arrives)
        self._did(rank, Action(stage, Kind.I, microbatch), now, end, stands_still)

    def _weight(self, now: float, rank: _Rank) -> None:
        stage, microbatch = rank.waiting[rank.done_weights]
        rank.done_weights += 1
        rank.alive -= self.problem.weight_activation[stage]
        self._did(rank, Action(stage, Kind.W, microbatch), now, now + self.problem.durations[2][stage], 0.0)

    def _did(self, rank: _Rank, action: Action, now: float, end: float, stands_still: float) -> None:
        rank.actions.append(action)
        rank.last_end, rank.free_at = end, end + stands_still
        rank.work_left -= end - now
        rank.actions_left -= 1

    def _wake(self, number: int, at: float) -> None:
        rank = self.ranks[number]
        if at < rank.waits_until:
            rank.waits_until = at
            heapq.heappush(self.queue, (at, number))
