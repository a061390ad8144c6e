"""ZB-H1: the memory of 1F1B and a third of its bubble.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 and figure 3 (arXiv 2401.10241). Every rank
holds `num_ranks` activations at most; the bubble is (p - 1)(F + I - W).
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.phases import delayed_weight_row, one_stage


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank: the warmup of 1F1B, and W `rank` microbatches behind I."""
    columns = one_stage(rank, num_microbatches)
    return delayed_weight_row(columns, columns, warmup=num_ranks - 1 - rank, delay=rank)
