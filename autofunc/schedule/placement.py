"""Placements: which rank holds which stage."""

from __future__ import annotations


def loop(num_ranks: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Stage `s` lives on rank `s % num_ranks`: with one stage per rank, stage r on rank r."""
    return tuple(stage % num_ranks for stage in range(num_ranks * stages_per_rank))
