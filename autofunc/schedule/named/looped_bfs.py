"""Looped breadth-first: several stages per rank, one after the other.

A stage runs all microbatches before the next begins.

Source: Lamy-Poirier, "Breadth-First Pipeline Parallelism", MLSys 2023, section 4.1 (arXiv 2211.05953). The bubble is that
of interleaved 1F1B; all activations are kept, and each stage's weights are used in one stretch.
"""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Kind, Table, compute_table


def row(rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Table:
    """The actions of one rank, which holds the stages `rank`, `rank + num_ranks`, ..."""
    stages = rank + num_ranks * np.arange(stages_per_rank)
    stage = np.concatenate((np.repeat(stages, num_microbatches), np.repeat(stages[::-1], num_microbatches)))
    kind = np.repeat((Kind.F, Kind.B), num_microbatches * stages_per_rank)
    return compute_table(stage, kind, np.tile(np.arange(num_microbatches), 2 * stages_per_rank))
