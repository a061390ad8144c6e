"""A timeline as blocks to draw: what every picture starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autofunc.schedule.effects import Dataflow, Edge, chain
from autofunc.schedule.ir import Kind, Schedule
from autofunc.schedule.network import build_network
from autofunc.schedule.timeline import Timeline

COLOURS = {Kind.F: "#6ea8e5", Kind.B: "#6cc08b", Kind.I: "#5fbfc4", Kind.W: "#eec15c"}
"""One per kind of computation, apart for people who see colours differently."""

WORDS = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}


class Block(NamedTuple):
    """One computation."""

    rank: int
    stage: int
    kind: Kind
    microbatch: int
    start: float  # from the first start of the timeline
    end: float
    waited: float  # idle time of the rank right before
    cause: str  # what ended the wait: an action of another rank, or nothing

    @property
    def name(self) -> str:
        """The action's text."""
        return f"{self.stage}{self.kind.name}{self.microbatch}"


def blocks_of(timeline: Timeline, edges: Sequence[Edge] | None = None) -> list[Block]:
    """All computations, rank by rank."""
    schedule = timeline.schedule
    flow = Dataflow(chain(schedule.num_stages) if edges is None else edges, schedule.is_forward_only)
    network = build_network(schedule, flow)
    start, end = np.concatenate(timeline.start), np.concatenate(timeline.end)
    origin = float(start.min())
    last_maker = np.full(len(start), -1)
    for channel in network.channels:
        reader, maker = channel.bundle.reader, channel.bundle.maker
        later = (last_maker[reader] < 0) | (end[maker] > end[last_maker[reader]])
        last_maker[reader[later]] = maker[later]
    blocks = []
    for rank in range(schedule.num_ranks):
        before = origin
        for flat in range(int(network.first[rank]), int(network.first[rank + 1])):
            stage, kind, microbatch, _ = network.table[flat].tolist()
            if kind > Kind.W:
                continue
            waited = max(float(start[flat]) - before, 0.0)
            cause = ""
            if waited > 1e-9 * (float(end[flat]) - origin) and last_maker[flat] >= 0:
                maker_rank, position = network.place(int(last_maker[flat]))
                cause = f"{schedule[maker_rank][position]} on rank {maker_rank}"
            before = float(end[flat])
            blocks.append(
                Block(rank, stage, Kind(kind), microbatch, float(start[flat]) - origin, before - origin, waited, cause)
            )
    return blocks


def letters_of(schedule: Schedule) -> dict[int, str]:
    """By stage, which of its rank's stages it is: a, b, c, ...; nothing where ranks have one stage each."""
    if schedule.num_stages == schedule.num_ranks:
        return dict.fromkeys(range(schedule.num_stages), "")
    names = {}
    for rank in range(schedule.num_ranks):
        for index, stage in enumerate(schedule.stages_of(rank)):
            names[stage] = chr(ord("a") + index % 26)
    return names


def title(timeline: Timeline) -> str:
    """What a timeline is called in a picture."""
    name = timeline.schedule.name
    return f"{name}, {timeline.label}" if timeline.label else name


def caption(timeline: Timeline) -> str:
    """The figures that go with a picture."""
    s = timeline.schedule
    return (
        f"{title(timeline)}: {s.num_ranks} ranks, {s.num_stages} stages, {s.num_microbatches} microbatches, "
        f"makespan {timeline.makespan:g}, bubble {timeline.bubble_fraction:.1%}"
    )
