"""Schedules from a building block: one microbatch's path over all ranks, repeated at a fixed interval.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024, section 3 (arXiv 2405.15362). With two
stages per rank a microbatch has six passes on a rank (F, I and W of each stage); with a pass as the unit of time, a block
may begin every six units if the passes of a rank fall on different times modulo six. How long a block lives on a rank is
how many activations that rank holds. Only the order matters here: ranks start what they can as soon as they can.
"""

from __future__ import annotations

from typing import NamedTuple

from autofunc.schedule.ir import Action, Kind, Table, as_table

INTERVAL = 6


class BuildingBlock(NamedTuple):
    """When a rank runs the passes of microbatch 0; W goes where there is room."""

    forward_down: int
    forward_up: int
    backward_up: int
    backward_down: int


def repeated(rank: int, num_ranks: int, num_microbatches: int, block: BuildingBlock) -> Table:
    """The row of one rank of a V: its block repeated, with each W in the first free unit after its I."""
    down, up = rank, 2 * num_ranks - 1 - rank
    passes = (
        (block.forward_down, down, Kind.F),
        (block.forward_up, up, Kind.F),
        (block.backward_up, up, Kind.I),
        (block.backward_down, down, Kind.I),
    )
    when = {
        begin + INTERVAL * microbatch: Action(stage, kind, microbatch)
        for begin, stage, kind in passes
        for microbatch in range(num_microbatches)
    }
    assert len(when) == 4 * num_microbatches, "passes of a rank must differ modulo the interval"
    actions: list[Action] = []
    waiting: list[Action] = []
    for time in range(max(when) + 1):
        if time in when:
            actions.append(when[time])
            if when[time].kind is Kind.I:
                waiting.append(when[time]._replace(kind=Kind.W))
        elif waiting:
            actions.append(waiting.pop(0))
    return as_table(actions + waiting)
