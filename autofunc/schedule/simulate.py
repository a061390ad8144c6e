"""Predict when each action of a schedule runs, from the costs of its actions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autofunc.schedule.effects import Activation, Cotangent, Dataflow, Edge, Token, chain
from autofunc.schedule.ir import Action, Schedule
from autofunc.schedule.timeline import Costs, Timeline
from autofunc.schedule.walk import walk


def simulate(schedule: Schedule, costs: Costs | None = None, edges: Sequence[Edge] | None = None) -> Timeline:
    """Simulate a schedule, in compute form or lowered.

    Every rank starts an action when its row allows and all it reads has arrived. A transfer between ranks takes
    `costs.comm` from the moment both ends are posted (in compute form: from the moment the value is made); transfers
    overlap computation and each other.

    Args:
        schedule: a valid schedule.
        costs: time of one action of one stage; all 1 and free transfers by default.
        edges: connections between stages; a chain by default.

    Raises:
        ScheduleError: for costs that do not fit, or a schedule that cannot run.
    """
    costs = costs or Costs()
    costs.check(schedule.num_stages)
    flow = Dataflow(chain(schedule.num_stages) if edges is None else edges, schedule.is_forward_only)
    start = tuple(np.zeros(len(row)) for row in schedule)
    end = tuple(np.zeros(len(row)) for row in schedule)
    clock = [0.0] * schedule.num_ranks
    ready: dict[tuple[int, Token], float] = {}
    half_posted: dict[Token, float] = {}

    for rank, position, action, effect in walk(schedule, flow):
        if action.kind.is_compute:
            begin = max([clock[rank], *(ready.pop((rank, token)) for token in effect.reads)])
            clock[rank] = begin + costs.of(action.stage, action.kind)
            start[rank][position], end[rank][position] = begin, clock[rank]
            for token in effect.writes:
                home = rank
                if not schedule.is_lowered and isinstance(token, (Activation, Cotangent)):
                    home = schedule.placement[token[1]]
                ready[home, token] = clock[rank] + (costs.comm if home != rank else 0.0)
            continue
        start[rank][position] = end[rank][position] = clock[rank]
        token = _transferred(action, flow)
        if token not in half_posted:
            half_posted[token] = clock[rank]
        else:
            both_posted = max(clock[rank], half_posted.pop(token))
            ready[schedule.placement[token[1]], token] = both_posted + costs.comm
        if action.kind.is_send:
            ready.pop((rank, token), None)
    return Timeline(schedule, start, end)


def _transferred(action: Action, flow: Dataflow) -> Token:
    effect = flow.effect(action)
    return (effect.reads or effect.writes)[0]
