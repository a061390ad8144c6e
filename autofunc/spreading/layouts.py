"""How a value lies over the ranks of one axis: the same on all of them, cut along a dim, or as terms of a sum.

A layout says the same of the value's gradient: of a value that is cut each rank has that part of the gradient; of a term it
has all of it. Of a full value there are two cases, which `sharing` tells apart: all ranks use it alike, so that each has
the whole gradient; or each uses it with a part of something else, so that each has one term of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Kind(Enum):
    """Layouts that need no more words."""

    FULL = "full"
    TERMS = "terms"


FULL, TERMS = Kind.FULL, Kind.TERMS


@dataclass(frozen=True)
class Cut:
    """Cut along a dim; each of several parts by itself, as the queries, keys and values of one fused weight.

    Rank r holds the r-th of `size` equal pieces of each part, one after the other.

    Args:
        dim: of the tensor, from 0 on.
        parts: sizes along it; their sum is the size of the whole.
    """

    dim: int
    parts: tuple[int, ...]

    @property
    def whole(self) -> int:
        """Size of the whole along the dim."""
        return sum(self.parts)

    @property
    def borders(self) -> tuple[int, ...]:
        """Where parts begin and end: from 0 to the size of the whole."""
        found = [0]
        for part in self.parts:
            found.append(found[-1] + part)
        return tuple(found)

    def fits(self, size: int) -> bool:
        """Whether every part can be cut into so many pieces."""
        return all(part % size == 0 for part in self.parts)

    def with_borders(self, places: Iterable[int]) -> Cut:
        """The same with parts that also begin at these places of the whole."""
        ends = sorted({*self.borders, *places} - {0})
        return Cut(self.dim, tuple(end - start for start, end in zip([0, *ends], ends, strict=False)))

    def at(self, dim: int) -> Cut:
        """The same along another dim."""
        return Cut(dim, self.parts)


Layout = Kind | Cut


def local_shape(shape: Sequence[int], layout: Layout, size: int) -> torch.Size:
    """The shape of what each of `size` ranks holds of a value."""
    if not isinstance(layout, Cut):
        return torch.Size(shape)
    return torch.Size([*shape[: layout.dim], layout.whole // size, *shape[layout.dim + 1 :]])


def piece_of(x: Tensor, cut: Cut, size: int, rank: int) -> Tensor:
    """A rank's pieces of a whole tensor; a view where there is one part."""
    pieces, start = [], 0
    for part in cut.parts:
        pieces.append(x.narrow(cut.dim, start + rank * (part // size), part // size))
        start += part
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, cut.dim)


def put_together(pieces: Sequence[Tensor], cut: Cut) -> Tensor:
    """The opposite of `piece_of`: the whole tensor of the pieces of all ranks, in order."""
    if len(cut.parts) == 1:
        return torch.cat(list(pieces), cut.dim)
    widths = [part // len(pieces) for part in cut.parts]
    split = [torch.split(piece, widths, cut.dim) for piece in pieces]
    return torch.cat([piece for part in zip(*split, strict=True) for piece in part], cut.dim)
