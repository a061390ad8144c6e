"""The ranks of a cp axis as operators see them, under a name that a captured graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor


class ContextRanks(Protocol):
    """All ranks of a cp axis, seen from one of them. Every rank calls each method, in the same order."""

    rank: int
    size: int

    def gather(self, x: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in rank order."""
        ...

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the sum of what all ranks give for this one; parts are in rank order and of one shape."""
        ...

    def rotate(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin sending a tensor to the next rank; the returned function waits for the previous rank's."""
        ...


class Imagined:
    """Ranks that do not exist. Graphs made for them are inspected, never run."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def gather(self, x: Tensor) -> list[Tensor]:
        """See `ContextRanks.gather`."""
        raise NotImplementedError("imagined ranks exchange nothing")

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """See `ContextRanks.reduce_scatter`."""
        raise NotImplementedError("imagined ranks exchange nothing")

    def rotate(self, x: Tensor) -> Callable[[], Tensor]:
        """See `ContextRanks.rotate`."""
        raise NotImplementedError("imagined ranks exchange nothing")


@cache
def imagined(size: int) -> str:
    """Return the name of `size` ranks that do not exist."""
    known_as(f"{size} imagined ranks", _made(size))
    return f"{size} imagined ranks"


@cache
def _made(size: int) -> Imagined:
    return Imagined(size)


_known: WeakValueDictionary[str, ContextRanks] = WeakValueDictionary()


def known_as(name: str, ranks: ContextRanks) -> None:
    """Let operators find the ranks by a name, for as long as the caller keeps `ranks` alive."""
    _known[name] = ranks


def ranks_of(name: str) -> ContextRanks:
    """Return the ranks registered by `known_as`."""
    return _known[name]
