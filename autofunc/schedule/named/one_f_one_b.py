"""1F1B: forwards and backwards alternate, so few activations live.

A rank keeps at most `num_ranks - rank` microbatches in flight.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, section 3.2, with the
flush of "Memory-Efficient Pipeline-Parallel DNN Training" (PipeDream-Flush), ICML 2021, section 3.1.
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.phases import alternate, one_stage


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank.

    With fewer microbatches than ranks the first ranks have no steady phase: they are GPipe rows.
    """
    columns = one_stage(rank, num_microbatches)
    return alternate(columns, columns, num_ranks - 1 - rank)
