"""Bounds no schedule can beat: they tell a search when it is done, and a reader how close it came."""

from __future__ import annotations

import math

from autofunc.schedule.searching.problem import NEVER, Problem


def problem_bound(problem: Problem) -> float:
    """Return a lower bound on the objective of a problem.

    A rank cannot end before the first microbatch has reached it and all its work is done. And the last microbatch's
    gradient, after it has left a stage that is alone on its rank, still has to travel back to the first one; by then the
    stage has run all its F and I, and all W for whose residuals there was no room.
    """
    forward, backward, weight = problem.durations
    ahead, back = problem.transfers
    m = problem.num_microbatches
    head = [0.0] * problem.num_stages  # from the first start of stage 0 to the earliest start of stage s
    for stage in range(1, problem.num_stages):
        head[stage] = head[stage - 1] + forward[stage - 1] + ahead[stage - 1][0]
    bounds = []
    for stages, work, room in zip(problem.stages_of, problem.work, problem.room, strict=True):
        bounds.append(work if problem.measure_span else work + min(head[stage] for stage in stages))
        if len(stages) > 1:
            continue
        (stage,) = stages
        kept = problem.weight_activation[stage]
        waiting = NEVER if kept == 0 or room == NEVER else math.floor((room - problem.activation[stage]) / kept + 1e-9)
        done = m * (forward[stage] + backward[stage]) + max(0.0, m - 1 - waiting) * weight[stage]
        home = sum(back[s][0] + backward[s - 1] for s in range(1, stage + 1))
        bounds.append(head[stage] + done + home + weight[0])
    # neither objective counts what a rank does before its first computation
    return max(bounds) - problem.costs.between - (problem.costs.receive if problem.measure_span else 0.0)
