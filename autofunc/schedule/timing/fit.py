"""From a measured timeline to the costs that would have made it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Kind
from autofunc.schedule.laws.network import Network, build_network
from autofunc.schedule.laws.walk import Times
from autofunc.schedule.timing.costs import Costs
from autofunc.schedule.timing.timeline import Timeline


def costs_of(timeline: Timeline) -> Costs:
    """Fit the costs of every stage, in the timeline's unit: means over microbatches, as a step takes their sum.

    `spread` is the relative standard deviation over microbatches, the median over stages and kinds. `send` and `receive`
    are the mean times from the end of the action before a post to the post's own. `between` is the mean time before a
    computation whose rank waits for nothing. `comm` is the median time from the start of a send (in compute form, the end
    of what makes the value) until a waiting rank has it. A stage whose backward is never split into I and W has all of it
    as W.

    Args:
        timeline: of a whole step, with forwards and backwards of every stage.

    Raises:
        ScheduleError: if a stage has no forward or no backward.
    """
    schedule = timeline.schedule
    network = build_network(schedule, timeline.edges)
    start, end = np.concatenate(timeline.start), np.concatenate(timeline.end)
    times: dict[Literal["F", "I", "W"], list[float]] = {"F": [], "I": [], "W": []}
    spreads: list[float] = []
    for stage in range(schedule.num_stages):
        means = {}
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W):
            mine = (network.table[:, 0] == stage) & (network.table[:, 1] == kind)
            lengths = (end - start)[mine]
            means[kind] = float(np.mean(lengths)) if len(lengths) else None
            if len(lengths) > 1 and means[kind]:
                spreads.append(float(np.std(lengths, ddof=1)) / float(np.mean(lengths)))
        forward, both, first, second = means.values()
        if forward is None or (both is None and (first is None or second is None)):
            raise ScheduleError(f"the timeline has no forward and backward of stage {stage}, so it has no costs")
        split = first is not None and second is not None
        times["F"].append(forward)
        times["I"].append(first if split and first is not None else 0.0)
        times["W"].append(second if split and second is not None else both or 0.0)
    spread = float(np.median(spreads)) if spreads else 0.0
    send, receive = (_post_time(network, start, end, kinds) for kinds in (_SENDS, _RECEIVES))
    comm, between = _transfer_time(network, start, end)
    return Costs(
        times["F"], times["I"], times["W"], comm=comm, send=send, receive=receive, between=between, spread=spread
    )  # fmt: skip


_SENDS, _RECEIVES = (Kind.SEND_F, Kind.SEND_B), (Kind.RECV_F, Kind.RECV_B)


def _before(network: Network, end: Times) -> Times:
    """Find when the previous action of the same rank ended, for each action; -inf for the first of a rank."""
    before = np.append(-np.inf, end[:-1])
    before[network.first[:-1][np.diff(network.first) > 0]] = -np.inf
    return before


def _post_time(network: Network, start: Times, end: Times, kinds: tuple[Kind, Kind]) -> float:
    """Find how long a post keeps a rank busy: it waits for nothing, so all time since the previous action is its own."""
    posts = np.flatnonzero(np.isin(network.table[:, 1], kinds))
    before = _before(network, end)[posts]
    times = end[posts] - np.where(np.isfinite(before), before, start[posts])
    return max(float(np.mean(times)), 0.0) if len(times) else 0.0


def _transfer_time(network: Network, start: Times, end: Times) -> tuple[float, float]:
    """Find how long a transfer takes, and how long a rank takes between actions when it waits for no transfer."""
    before = _before(network, end)
    posted = start if network.schedule.is_lowered else end  # by action: when its value may leave
    delays, sent = [], np.full(len(start), -np.inf)  # when the last value that an action reads was sent
    for crossing in network.crossings:
        send, reader = crossing.send, crossing.bundle.reader
        there = (send >= 0) & (reader >= 0)
        send, reader = send[there], reader[there]
        sent[reader] = np.maximum(sent[reader], posted[send])
        waited = np.isfinite(before[reader]) & (before[reader] < posted[send])  # the reader was idle when it was sent
        delays.append((start[reader] - posted[send])[waited])
    found = np.concatenate(delays) if delays else np.empty(0)
    delay = max(float(np.median(found)), 0.0) if len(found) else 0.0
    at_once = (network.table[:, 1] <= Kind.W) & np.isfinite(before) & (sent + delay <= before)
    between = max(float(np.mean((start - before)[at_once])), 0.0) if at_once.any() else 0.0
    return max(delay - between, 0.0), between
