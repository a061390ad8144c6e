"""The ranks of a cp axis as operators see them, by a name that a captured graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


_known: WeakValueDictionary[str, ContextRanks] = WeakValueDictionary()  # by a name, which a captured graph can hold


def known_as(name: str, ranks: ContextRanks) -> None:
    """Let operators find the ranks by a name, as long as someone else keeps them."""
    _known[name] = ranks


def ranks_of(name: str) -> ContextRanks:
    """Those that `known_as` was told of."""
    return _known[name]
