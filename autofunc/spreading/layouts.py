"""The layout of a value over the ranks of one axis: the same on all of them, cut along a dim, or terms of a sum.

The gradient has the same layout: of a cut value, each rank has its part of the gradient; of a term, all of it. A full value
has two cases, which `sharing` tells apart: if all ranks use it alike, each has the whole gradient; if each uses it with its
part of something else, each has one term of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Kind(Enum):
    """Layouts without further data."""

    FULL = "full"
    TERMS = "terms"


FULL, TERMS = Kind.FULL, Kind.TERMS


@dataclass(frozen=True)
class Cut:
    """Cut along a dim, each part separately, like the queries, keys and values of a fused weight.

    Rank r holds the r-th of `size` equal pieces of each part, concatenated.

    Args:
        dim: of the tensor, from 0.
        parts: their sizes along it; the sum is the size of the whole.
    """

    dim: int
    parts: tuple[int, ...]

    @property
    def whole(self) -> int:
        """Size of the whole along the dim."""
        return sum(self.parts)

    @property
    def borders(self) -> tuple[int, ...]:
        """Offsets at which parts begin and end: from 0 to the size of the whole."""
        found = [0]
        for part in self.parts:
            found.append(found[-1] + part)
        return tuple(found)

    def fits(self, size: int) -> bool:
        """True if every part can be cut into this many equal pieces."""
        return all(part % size == 0 for part in self.parts)

    def with_borders(self, places: Iterable[int]) -> Cut:
        """Return the same cut with parts that also begin at these offsets of the whole."""
        ends = sorted({*self.borders, *places} - {0})
        return Cut(self.dim, tuple(end - start for start, end in zip([0, *ends], ends, strict=False)))

    def at(self, dim: int) -> Cut:
        """Return the same cut along another dim."""
        return Cut(dim, self.parts)


Layout = Kind | Cut


def local_shape(shape: Sequence[int], layout: Layout, size: int) -> torch.Size:
    """Return the shape that each of `size` ranks holds of a value."""
    if not isinstance(layout, Cut):
        return torch.Size(shape)
    return torch.Size([*shape[: layout.dim], layout.whole // size, *shape[layout.dim + 1 :]])


def piece_of(x: Tensor, cut: Cut, size: int, rank: int) -> Tensor:
    """Return a rank's pieces of a whole tensor; a view if there is one part."""
    pieces, start = [], 0
    for part in cut.parts:
        pieces.append(x.narrow(cut.dim, start + rank * (part // size), part // size))
        start += part
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, cut.dim)


def put_together(pieces: Sequence[Tensor], cut: Cut) -> Tensor:
    """Invert `piece_of`: return the whole tensor from the pieces of all ranks, in rank order."""
    if len(cut.parts) == 1:
        return torch.cat(list(pieces), cut.dim)
    widths = [part // len(pieces) for part in cut.parts]
    split = [torch.split(piece, widths, cut.dim) for piece in pieces]
    return torch.cat([piece for part in zip(*split, strict=True) for piece in part], cut.dim)
