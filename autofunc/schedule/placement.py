"""Placements: which rank holds which stage."""

from __future__ import annotations


def loop(num_ranks: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Stage `s` lives on rank `s % num_ranks`: with one stage per rank, stage r on rank r."""
    return tuple(stage % num_ranks for stage in range(num_ranks * stages_per_rank))


def v_shape(num_ranks: int, stages_per_rank: int = 2) -> tuple[int, ...]:
    """Down the ranks and up again: rank 0 holds the first and the last stage. The rank at a turn holds two in a row."""
    down = range(num_ranks)
    return tuple(rank for leg in range(stages_per_rank) for rank in (reversed(down) if leg % 2 else down))
