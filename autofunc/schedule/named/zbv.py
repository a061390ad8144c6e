"""ZB-V: zero bubble at the memory of 1F1B, two stages a rank in a V.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241 (v2 on), section 6, and the same phases in PyTorch,
`torch/distributed/pipelining/schedules.py`, ScheduleZBVZeroBubble. With F = I = W no rank idles between its first
action and its last, and every rank holds `num_ranks` microbatches at most (in stage activations, twice as many). The
construction fills the pipeline with 2p - 1 microbatches; with fewer, the actions of missing microbatches are dropped.
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.script import passes_of, scripted


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank, which holds the stages `rank` and `2 * num_ranks - 1 - rank`."""
    f_down, _, i_down, w_down = passes_of(rank)
    f_up, _, i_up, w_up = passes_of(2 * num_ranks - 1 - rank)
    count = max(num_microbatches, 2 * num_ranks - 1)
    above, below = rank, num_ranks - rank  # ranks before this one; this one and those nearer to the turn
    phases = (
        ((f_down,), 2 * below - 1),
        ((f_up, f_down), above),
        ((f_up, i_up, w_up), below),
        ((f_down, i_down, w_down, f_up, i_up, w_up), count - (2 * below - 1) - above),
        ((i_down, w_down, f_up, i_up, w_up), below - 1),  # all forwards on the way down have run
        ((i_down, i_up), above),
        ((i_down, w_down), below),
        ((w_up,), above),
        ((w_down,), above),
    )
    return scripted(phases, num_microbatches)
