"""Where rows go on their way to the ranks that hold their experts, and where they arrive; tensors, so no host waits.

Shapes: `ranks` processes with S rows each, and E experts, of which rank r holds E / ranks, from `r * E / ranks` on.
`counts`, int64 (ranks, E), is the number of rows each rank has for each expert. A rank's rows are sorted by expert, and so
by the rank that holds it.

A buffer of an all-to-all has one part for each rank: of S rows, real or not ("padded"), or of the real ones ("exact").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def own_experts(counts: Tensor, rank: int) -> Tensor:
    """Return the number of rows each rank has for each of this rank's experts: (ranks, E / ranks)."""
    return counts.chunk(counts.shape[0], dim=1)[rank]


def sent(counts: Tensor, rank: int) -> Tensor:
    """Return the number of rows this rank has for each rank: (ranks,)."""
    return counts[rank].view(counts.shape[0], -1).sum(1)


def padded_places(counts: Tensor, rank: int, rows: int) -> Tensor:
    """Return the place of each of this rank's S rows in a padded buffer with a part for each destination: (S,)."""
    totals = sent(counts, rank)
    ends = totals.cumsum(0)
    place = torch.arange(rows, device=counts.device)
    owner = torch.searchsorted(ends, place, right=True)
    return owner * rows + place - (ends - totals)[owner]


class Arrived(NamedTuple):
    """The rows for a rank's experts, sorted by expert and then by sender: `ranks * S`, those that nobody sent included."""

    source: Tensor  # (ranks * S,): the place of each in the buffer, which has a part for each sender
    is_real: Tensor  # bool, (ranks * S,): whether anybody sent it; the others come last


def arrived(counts: Tensor, rank: int, rows: int, *, padded: bool) -> Arrived:
    """Find the rows for this rank's experts in a receive buffer.

    Args:
        counts: of all ranks.
        rank: this one.
        rows: S.
        padded: whether each sender's part of the buffer has S rows, or as many as it sent.
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
