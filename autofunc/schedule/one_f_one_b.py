"""1F1B: each rank keeps at most `num_ranks - rank` microbatches in flight by alternating forwards and backwards.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, section 3.2, with the
flush of "Memory-Efficient Pipeline-Parallel DNN Training" (PipeDream-Flush), ICML 2021, section 3.1.
"""

from __future__ import annotations

import numpy as np

from autofunc.schedule.ir import Kind, Table, compute_table


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank: warmup forwards, then forward-backward pairs, then the backwards that are left.

    With fewer microbatches than ranks the first ranks have no steady phase: they are GPipe rows.
    """
    warmup = min(num_microbatches, num_ranks - 1 - rank)
    steady = num_microbatches - warmup
    pairs = np.stack((warmup + np.arange(steady), np.arange(steady)), axis=-1)
    microbatch = np.concatenate((np.arange(warmup), pairs.reshape(-1), steady + np.arange(warmup)))
    kind = np.concatenate((np.full(warmup, Kind.F), np.tile((Kind.F, Kind.B), steady), np.full(warmup, Kind.B)))
    return compute_table(rank, kind, microbatch)
