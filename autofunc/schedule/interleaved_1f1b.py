"""Interleaved 1F1B: several stages per rank, for a bubble that much smaller.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
section 2.2.2 (arXiv 2104.04473). Microbatches go through a rank's stages in rounds of at least `num_ranks`. The paper asks
for a multiple of the number of ranks; here the rounds are as even as possible, larger ones first, so any number works.
"""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Table
from autofunc.schedule.phases import Columns, alternate


def row(rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Table:
    """The actions of one rank, which holds the stages `rank`, `rank + num_ranks`, ..."""
    rounds = np.array_split(np.arange(num_microbatches), max(1, num_microbatches // num_ranks))
    stages = rank + num_ranks * np.arange(stages_per_rank)
    warmup = (stages_per_rank - 1) * len(rounds[0]) + 2 * (num_ranks - 1 - rank)
    return alternate(_in_rounds(rounds, stages), _in_rounds(rounds, stages[::-1]), warmup)


def _in_rounds(rounds: list[np.ndarray], stages: np.ndarray) -> Columns:
    """Each round goes through all stages before the next begins."""
    parts = [np.stack((np.full(len(each), stage), each), axis=-1) for each in rounds for stage in stages]
    return np.concatenate(parts)
