"""Hill climbing over policies, by random changes."""

from __future__ import annotations

import random

from autofunc.schedule.ir import Action
from autofunc.schedule.searching.policy import Policy, Rules, run_policy
from autofunc.schedule.searching.problem import NEVER, Problem

_PATIENCE = 1000
"""Changes without an improvement after which a climb restarts elsewhere."""


class Climb:
    """Random changes to a policy; those that do no harm stay."""

    def __init__(self, problem: Problem, rng: random.Random) -> None:
        self.problem, self.rng = problem, rng
        self._restart()

    def _restart(self) -> None:
        self.current: Policy | None = None
        self.value, self.stale = NEVER, 0

    def step(self, best: float) -> list[list[Action]] | None:
        """Try one policy; return its actions, per rank, if they look better than `best`."""
        if self.stale > _PATIENCE:
            self._restart()
        draw_new = self.current is None or self.rng.random() < 0.1
        policy = self._draw() if draw_new or self.current is None else self._change(self.current)
        outcome = run_policy(self.problem, policy, self.value)
        self.stale += 1
        if outcome is None:
            return None
        if outcome.value < self.value * (1 - 1e-9):
            self.stale = 0
        self.current, self.value = policy, outcome.value
        return outcome.rows if outcome.value < best * (1 - 1e-12) else None

    def _draw(self) -> Policy:
        """Draw a policy in one of the shapes that known schedules have."""
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
        """Change a few numbers of a policy."""
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
