"""Interleaved zero bubble: interleaved 1F1B with weight gradients in its bubbles.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 (arXiv 2401.10241), applied to the looped
stages of Narayanan et al. 2021 as in PyTorch, `torch/distributed/pipelining/schedules.py`, ScheduleInterleavedZeroBubble.
Every rank holds `num_ranks * stages_per_rank` stage activations at most, fewer than interleaved 1F1B, if microbatches
divide into rounds of `num_ranks`; else `(stages_per_rank - 1) * longest round + num_ranks`.
"""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Table
from autofunc.schedule.named.phases import delayed_weight_row, in_rounds


def row(rank: int, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Table:
    """The actions of one rank, which holds the stages `rank`, `rank + num_ranks`, ..."""
    stages = rank + num_ranks * np.arange(stages_per_rank)
    forwards, longest_round = in_rounds(stages, num_ranks, num_microbatches)
    backwards, _ = in_rounds(stages[::-1], num_ranks, num_microbatches)
    warmup = (stages_per_rank - 1) * longest_round + num_ranks - 1 - rank
    return delayed_weight_row(forwards, backwards, warmup, delay=rank)
