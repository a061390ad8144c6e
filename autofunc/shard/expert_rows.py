"""Where rows go that are sent to the ranks of their experts, and where they are found: as tensors, for no host to wait.

Shapes: `ranks` processes with S rows each, E experts, of which rank r has E / ranks from `r * E / ranks` on. `counts`,
int64 (ranks, E), is how many rows each rank has for each expert. A rank's rows are sorted by expert, and so by who has it.

A buffer between two all-to-alls has one part for each rank: of S rows, whatever is in them ("padded"), or of as many as
there are ("exact").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def own_experts(counts: Tensor, rank: int) -> Tensor:
    """How many rows each rank has for each of this rank's experts: (ranks, E / ranks)."""
    return counts.chunk(counts.shape[0], dim=1)[rank]


def sent(counts: Tensor, rank: int) -> Tensor:
    """How many rows this rank has for each rank: (ranks,)."""
    return counts[rank].view(counts.shape[0], -1).sum(1)


def padded_places(counts: Tensor, rank: int, rows: int) -> Tensor:
    """The place of each of this rank's S rows in a padded buffer, which has a part for each rank that they go to: (S,)."""
    totals = sent(counts, rank)
    ends = totals.cumsum(0)
    place = torch.arange(rows, device=counts.device)
    owner = torch.searchsorted(ends, place, right=True)
    return owner * rows + place - (ends - totals)[owner]


class Arrived(NamedTuple):
    """The rows that came for a rank's experts, sorted by expert and then by who sent them: `ranks * S` with unreal ones."""

    source: Tensor  # (ranks * S,): where each lies in the buffer, which has a part for each rank that they came from
    is_real: Tensor  # bool, (ranks * S,): whether anybody sent it; those that nobody did come last


def arrived(counts: Tensor, rank: int, rows: int, *, padded: bool) -> Arrived:
    """Where the rows that came for this rank's experts lie in a buffer.

    Args:
        counts: of all ranks.
        rank: this one.
        rows: S.
        padded: whether each rank's part of the buffer has S rows, or as many as it sent.
    """
    from_each = own_experts(counts, rank)  # (ranks, own experts)
    ranks = counts.shape[0]
    totals = from_each.sum(1)
    base = torch.arange(ranks, device=counts.device) * rows if padded else totals.cumsum(0) - totals
    begin = base[:, None] + from_each.cumsum(1) - from_each  # of each rank's rows for each expert, in the buffer
    lengths = from_each.t().reshape(-1)  # by expert, then by rank
    ends = lengths.cumsum(0)
    place = torch.arange(ranks * rows, device=counts.device)
    run = torch.searchsorted(ends, place, right=True).clamp_(max=len(ends) - 1)
    source = begin.t().reshape(-1)[run] + place - (ends - lengths)[run]
    return Arrived(source, place < ends[-1])
