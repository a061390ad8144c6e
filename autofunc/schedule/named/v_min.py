"""V-Min: a third of the memory of 1F1B, two stages a rank in a V.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024, section 3.3 (arXiv 2405.15362); offsets of
the building block as in sail-sg/zero-bubble-pipeline-parallelism, `scheduler/zbv_greedy.py`. Every rank holds
`(num_ranks + 4) // 3` microbatches at most (in stage activations, twice as many).
"""

from __future__ import annotations

from autofunc.schedule.ir import Table
from autofunc.schedule.named.repeated_block import BuildingBlock, repeated


def row(rank: int, num_ranks: int, num_microbatches: int) -> Table:
    """The actions of one rank, which holds the stages `rank` and `2 * num_ranks - 1 - rank`."""
    shift = 2 if num_ranks % 3 == 0 else 0  # keeps passes of a rank apart
    block = BuildingBlock(
        forward_down=rank,
        forward_up=2 * num_ranks - 1 - rank,
        backward_up=2 * num_ranks + shift + rank,
        backward_down=4 * num_ranks - 1 + shift - rank,
    )
    return repeated(rank, num_ranks, num_microbatches, block)
