"""ZB-H2: no bubble inside a span, for twice the memory of 1F1B.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.1 and figure 3 (arXiv 2401.10241). Every rank
holds `2 * num_ranks - 1` activations at most; the bubble is (p - 1)(F + I - 2W), once ranks may start their optimizer step
at different times.
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.phases import delayed_weight_row, one_stage


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank: twice the warmup of 1F1B, and W `2 * rank` microbatches behind I."""
    columns = one_stage(rank, num_microbatches)
    return delayed_weight_row(columns, columns, warmup=2 * (num_ranks - 1 - rank), delay=2 * rank)
