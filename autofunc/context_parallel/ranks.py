"""The ranks of a cp axis as operators see them, by a name that a captured graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol
from weakref import WeakValueDictionary

from torch import Tensor


class ContextRanks(Protocol):
    """All ranks of one cp axis, as one of them sees it. All of them call a method, in the same order."""

    rank: int
    size: int

    def gather(self, x: Tensor) -> list[Tensor]:
        """Everyone's tensor, in rank order."""
        ...

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of what everyone gives for this rank; parts are in rank order, and of one shape."""
        ...

    def rotate(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to send a tensor to the next rank; what is returned waits for that of the rank before."""
        ...


class Imagined:
    """Ranks that do not exist: of their number graphs are made, which nobody runs."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def gather(self, x: Tensor) -> list[Tensor]:
        """See `ContextRanks.gather`."""
        raise NotImplementedError("there is nobody else")

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """See `ContextRanks.reduce_scatter`."""
        raise NotImplementedError("there is nobody else")

    def rotate(self, x: Tensor) -> Callable[[], Tensor]:
        """See `ContextRanks.rotate`."""
        raise NotImplementedError("there is nobody else")


@cache
def imagined(size: int) -> str:
    """The name of so many ranks that do not exist."""
    known_as(f"{size} imagined ranks", _made(size))
    return f"{size} imagined ranks"


@cache
def _made(size: int) -> Imagined:
    return Imagined(size)


_known: WeakValueDictionary[str, ContextRanks] = WeakValueDictionary()  # by a name, which a captured graph can hold


def known_as(name: str, ranks: ContextRanks) -> None:
    """Let operators find the ranks by a name, as long as someone else keeps them."""
    _known[name] = ranks


def ranks_of(name: str) -> ContextRanks:
    """Those that `known_as` was told of."""
    return _known[name]
