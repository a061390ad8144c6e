"""GPipe: all forwards, then all backwards.

Source: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019, section 2.2
(arXiv 1811.06965). Backwards run in microbatch order here, so that gradients are summed in the oracle's order.
"""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Kind, Table, compute_table


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank: `F0 ... F(m-1) B0 ... B(m-1)`."""
    microbatch = np.tile(np.arange(num_microbatches), 2)
    kind = np.repeat((Kind.F, Kind.B), num_microbatches)
    return compute_table(rank, kind, microbatch)
