"""A timeline as blocks to draw; every picture starts from these."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.laws.network import build_network
from autofunc.schedule.timing.timeline import Timeline
from autofunc.shown import shown

COLOURS = {Kind.F: "#6ea8e5", Kind.B: "#6cc08b", Kind.I: "#5fbfc4", Kind.W: "#eec15c"}
"""One per kind of computation, distinct for colour-blind readers too."""

WORDS = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}


class Block(NamedTuple):
    """One computation, or one turn of an overlapped one."""

    rank: int
    stage: int
    kind: Kind
    microbatch: int
    start: float  # relative to the timeline's first start
    end: float
    waited: float  # idle time of the rank right before
    cause: str  # what it waited for: an action of another rank, or the rank's own transfers

    @property
    def name(self) -> str:
        """The action's text."""
        return f"{self.stage}{self.kind.name}{self.microbatch}"


def blocks_of(timeline: Timeline) -> list[Block]:
    """Return all computations as blocks, rank by rank."""
    schedule, origin = timeline.schedule, timeline.origin
    network = build_network(schedule, timeline.edges)
    start, end = np.concatenate(timeline.start), np.concatenate(timeline.end)
    arrived = start if timeline.arrived is None else np.concatenate(timeline.arrived)
    last_maker = np.full(len(start), -1)
    for crossing in network.crossings:
        reader, maker = crossing.bundle.reader, crossing.bundle.maker
        later = (last_maker[reader] < 0) | (end[maker] > end[last_maker[reader]])
        last_maker[reader[later]] = maker[later]
    blocks = []
    for rank in range(schedule.num_ranks):
        before, turns = origin, _turns_of(timeline, rank)
        for flat in range(int(network.first[rank]), int(network.first[rank + 1])):
            stage, kind, microbatch, _ = network.table[flat].tolist()
            if kind > Kind.W:
                continue
            begun = float(start[flat])
            waited = max(begun - before, 0.0)
            cause = ""
            if waited > 1e-9 * (begun - origin + 1.0):
                cause = "its own transfers"
                if last_maker[flat] >= 0 and arrived[flat] >= begun - 1e-9 * abs(begun):
                    maker_rank, position = network.locate(int(last_maker[flat]))
                    cause = f"{schedule[maker_rank][position]} on rank {maker_rank}"
            before = float(end[flat])
            for start_of, end_of in turns.get(flat - int(network.first[rank]), [(begun, before)]):
                blocks.append(Block(rank, stage, Kind(kind), microbatch, start_of - origin, end_of - origin, waited, cause))
                waited, cause = 0.0, ""
    return blocks


def _turns_of(timeline: Timeline, rank: int) -> dict[int, list[tuple[float, float]]]:
    """Return when each action that ran interleaved with another computed, by position in its row."""
    found: dict[int, list[tuple[float, float]]] = {}
    for position, start, end, waits in timeline.turns[rank] if timeline.turns is not None else ():
        if not waits:
            found.setdefault(position, []).append((start, end))
    return found


def letters_of(schedule: Schedule) -> dict[int, str]:
    """Letter each stage by its place on its rank: a, b, c, ...; empty if every rank has one stage."""
    if len(set(schedule.placement)) == schedule.num_stages:
        return dict.fromkeys(range(schedule.num_stages), "")
    names = {}
    for rank in range(schedule.num_ranks):
        for index, stage in enumerate(schedule.stages_of(rank)):
            names[stage] = chr(ord("a") + index % 26)
    return names


def title(timeline: Timeline) -> str:
    """Return a timeline's title in a picture."""
    name = shown(timeline.schedule.name)
    return f"{name}, {shown(timeline.label)}" if timeline.label else name


def caption(timeline: Timeline) -> str:
    """Return a picture's caption: sizes, makespan and bubble."""
    s = timeline.schedule
    return (
        f"{title(timeline)}: {s.num_ranks} ranks, {s.num_stages} stages, {s.num_microbatches} microbatches, "
        f"makespan {timeline.makespan:g}, bubble {timeline.bubble_fraction:.1%}"
    )
