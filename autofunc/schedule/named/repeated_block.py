"""Schedules from a building block: one microbatch's path over all ranks, repeated at a fixed interval.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024, section 3 (arXiv 2405.15362). With two
stages per rank a microbatch has six passes on a rank (F, I and W of each stage); with a pass as the unit of time, a block
may begin every six units if the passes of a rank fall on different times modulo six. The time a block lives on a rank
sets how many activations that rank holds. Only the order matters here: ranks start each pass as soon as they can.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autofunc.schedule.ir import Kind, Table, compute_table

INTERVAL = 6


class BuildingBlock(NamedTuple):
    """When a rank runs the passes of microbatch 0; W goes where there is room."""

    forward_down: int
    forward_up: int
    backward_up: int
    backward_down: int


def repeated(rank: int, num_ranks: int, num_microbatches: int, block: BuildingBlock) -> Table:
    """Build the row of one rank of a V: its block repeated, with each W in the first free unit after its `I`."""
    assert len({begin % INTERVAL for begin in block}) == len(block), "passes of a rank must differ modulo the interval"
    down, up = rank, 2 * num_ranks - 1 - rank
    number = np.arange(num_microbatches)
    begins = np.array(block)[:, None] + INTERVAL * number  # by pass and microbatch
    backwards = begins[2:].reshape(-1)
    earlier = np.argsort(backwards, kind="stable")  # W run in the order of their I
    whole = int(begins.max()) + 2 * num_microbatches + 1  # units, with room for every W after the last pass
    is_free = np.ones(whole, bool)
    is_free[begins.reshape(-1)] = False
    free = np.flatnonzero(is_free)
    first_free = np.cumsum(is_free)[backwards[earlier]]  # of the free units, the first one after each I
    turn = np.arange(2 * num_microbatches)
    weights = free[np.maximum.accumulate(first_free - turn) + turn]  # each W comes after the W before it
    stage = np.repeat((down, up, up, down), num_microbatches)
    kind = np.repeat((Kind.F, Kind.F, Kind.I, Kind.I), num_microbatches)
    order = np.argsort(np.concatenate((begins.reshape(-1), weights)), kind="stable")
    stages = np.concatenate((stage, np.repeat((up, down), num_microbatches)[earlier]))[order]
    kinds = np.concatenate((kind, np.full(2 * num_microbatches, Kind.W)))[order]
    return compute_table(stages, kinds, np.concatenate((np.tile(number, 4), np.tile(number, 2)[earlier]))[order])
