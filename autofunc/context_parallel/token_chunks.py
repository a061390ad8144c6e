"""The assignment of tokens to context parallel ranks.

The sequence is cut into two chunks per rank: rank r has chunk r and chunk `2 * size - 1 - r`, in this order. Under a causal
mask later tokens see more, so this gives all ranks the same work.

Source: Dubey et al., "The Llama 3 Herd of Models", arXiv 2407.21783, section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autofunc.errors import BatchError


def check_length(tokens: int, size: int, what: str) -> None:
    """Refuse a sequence that does not divide into equal chunks.

    Args:
        tokens: its length.
        size: number of cp ranks.
        what: a name for messages.

    Raises:
        BatchError: naming the nearest lengths that divide.
    """
    each = 2 * size
    if tokens % each == 0 and tokens:
        return
    below = tokens // each * each
    nearest = f"{below} or {below + each}" if below else f"{each}"
    raise BatchError(
        f"{what} has {tokens} tokens, which cp={size} ranks cannot cut into {each} equal chunks (two a rank); pad it "
        f"to a multiple of {each}, such as {nearest}"
    )


def own_part(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return a rank's two chunks of a whole sequence, one after the other; a copy."""
    each = x.shape[dim] // (2 * size)
    return torch.cat([x.narrow(dim, chunk * each, each) for chunk in (rank, 2 * size - 1 - rank)], dim)


def in_order(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return the whole sequence from the parts of all ranks, in rank order."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def spread_out(part: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return a whole sequence with a rank's part in its places and zeros elsewhere."""
    each = part.shape[dim] // 2
    whole = part.new_zeros((*part.shape[:dim], 2 * size * each, *part.shape[dim + 1 :]))
    for half, chunk in zip(part.chunk(2, dim), (rank, 2 * size - 1 - rank), strict=True):
        whole.narrow(dim, chunk * each, each).copy_(half)
    return whole
