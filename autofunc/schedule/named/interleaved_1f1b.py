"""Interleaved 1F1B: several stages per rank, for a bubble that much smaller.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
section 2.2.2 (arXiv 2104.04473). Microbatches go through a rank's stages in rounds of at least `num_ranks`. The paper asks
for a multiple of the number of ranks; here the rounds are as even as possible, so any number works.
"""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Table
from autofunc.schedule.named.phases import alternate, in_rounds


def row(rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Table:
    """The actions of one rank, which holds the stages `rank`, `rank + num_ranks`, ..."""
    stages = rank + num_ranks * np.arange(stages_per_rank)
    forwards, longest_round = in_rounds(stages, num_ranks, num_microbatches)
    backwards, _ = in_rounds(stages[::-1], num_ranks, num_microbatches)
    warmup = (stages_per_rank - 1) * longest_round + 2 * (num_ranks - 1 - rank)
    return alternate(forwards, backwards, warmup)
