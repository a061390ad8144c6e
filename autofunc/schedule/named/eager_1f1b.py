"""Eager 1F1B: 1F1B with twice the warmup, which hides transfers.

In 1F1B each of a rank's actions needs what its neighbour has just made, so every transfer counts. Here, between warmup and
cooldown, values arrive one action before they are needed: with equal F and B, a transfer may take as long as either. A rank
keeps at most `2 * (num_ranks - rank) - 1` microbatches in flight.

Source: Zhuang et al., "On Optimizing the Communication of Model Parallelism", MLSys 2023, section 4 (arXiv 2211.05322);
`OverlapFriendlyPipeDreamSchedule` of alpa-projects/alpa, `alpa/pipeline_parallel/schedules.py`.
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.phases import alternate, one_stage


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank."""
    columns = one_stage(rank, num_microbatches)
    return alternate(columns, columns, 2 * (num_ranks - 1 - rank))
