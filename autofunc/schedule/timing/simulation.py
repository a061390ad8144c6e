"""Predict when each action of a schedule runs, from the costs of its actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autofunc.errors import ScheduleError
from autofunc.schedule.effects import Edge
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.laws.network import Network, build_network
from autofunc.schedule.laws.walk import Pace, Times, walk
from autofunc.schedule.timing.costs import Costs
from autofunc.schedule.timing.timeline import Timeline
from autofunc.shown import shown


def simulate(schedule: Schedule, costs: Costs | None = None, edges: Sequence[Edge] | None = None) -> Timeline:
    """Simulate a schedule, in compute form or lowered.

    Every rank starts an action when its row allows it and all that the action reads has arrived. A transfer between ranks
    begins when the value is made (lowered: sent) and the wire between the two ranks is free, and takes `comm` on the wire
    and `latency` after it; lowered, its value arrives no sooner than that long after its receive was posted. Transfers
    overlap computation, except for the part of `comm` that `overlap` leaves to the sending rank.
    Before a computation its rank is busy for `between`. Posting keeps it busy for `send` and `receive`: lowered, where its
    row says so; in compute form, a send is posted right after its value is made, and a receive once the value has arrived.
    A transfer runs while its send is being posted.
    Gathering and reducing (UNSHARD, REDUCE_GRAD) take no time here.

    Args:
        schedule: a valid schedule.
        costs: time of one action of one stage; all 1 and free transfers by default.
        edges: connections between stages; a chain by default.

    Raises:
        ScheduleError: for costs that do not fit, or a schedule that cannot run.
    """
    network, pace = _network_and_pace(schedule, costs or Costs(), edges)
    return _timeline(network, pace, edges)


def expected_makespan(
    schedule: Schedule, costs: Costs, edges: Sequence[Edge] | None = None, *, samples: int = 100, seed: int = 0
) -> float:
    """Return the mean makespan under timing noise: each computation varies by `costs.spread`.

    It is longer than the simulated one: a rank that waits for another always waits for the slower of the two,
    and time saved by a fast action is lost again at the next wait.

    Args:
        schedule: as for `simulate`.
        costs: as for `simulate`, with a `spread`.
        edges: connections between stages; a chain by default.
        samples: how many steps are drawn.
        seed: of the draws.

    Raises:
        ScheduleError: as `simulate` does.
    """
    network, pace = _network_and_pace(schedule, costs, edges)
    draws = np.random.default_rng(seed)
    found = []
    for _ in range(samples):
        factor = np.maximum(1.0 + costs.spread * draws.standard_normal(len(pace.duration)), 0.0)
        found.append(_timeline(network, replace(pace, duration=pace.duration * factor), edges).makespan)
    return float(np.mean(found))


def _network_and_pace(schedule: Schedule, costs: Costs, edges: Sequence[Edge] | None) -> tuple[Network, Pace]:
    costs.check(schedule.num_stages)
    network = build_network(schedule, edges)
    transfer = np.array([costs.transfer(crossing.source, crossing.target) for crossing in network.crossings])
    duration = np.concatenate([costs.durations(row.table, schedule.num_stages) for row in schedule])
    post = 0.0 if schedule.is_lowered else costs.send  # lowered, posts are actions themselves
    pace = Pace(duration, transfer, costs.latency, (1 - costs.overlap) * transfer + post, _before(network, costs))
    if not pace.duration.any():
        raise ScheduleError(f"schedule {shown(schedule.name)}: every action it runs is free, so nothing takes any time")
    return network, pace


def _before(network: Network, costs: Costs) -> Times | None:
    """Return, per action, how long its rank is busy before it; in compute form that includes posting receives."""
    before = np.where(network.table[:, 1] <= Kind.W, costs.between, 0.0) if costs.between else None
    if costs.receive and not network.schedule.is_lowered:
        before = np.zeros(network.num_actions) if before is None else before
        for crossing in network.crossings:
            reader = crossing.bundle.reader
            before[reader[reader >= 0]] += costs.receive
    return before


def _timeline(network: Network, pace: Pace, edges: Sequence[Edge] | None) -> Timeline:
    start, end, arrived = walk(network, pace)
    return Timeline(network.schedule, start, end, edges=None if edges is None else tuple(edges), arrived=arrived)
