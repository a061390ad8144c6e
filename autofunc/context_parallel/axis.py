"""The choice of how tokens are cut over ranks, as all that needs it is given it."""

from __future__ import annotations

from dataclasses import dataclass

from autofunc.context_parallel.ranks import imagined


@dataclass(frozen=True)
class ContextAxis:
    """Ranks that share the tokens of a microbatch.

    Args:
        ranks: their name, see `ranks.known_as`.
        size: how many they are.
        method: how attention comes by keys and values, see `attention.METHODS`.
    """

    ranks: str
    size: int
    method: str


def imagined_axis(size: int, method: str) -> ContextAxis | None:
    """Of ranks that do not exist, to find out what graphs would be; None where there is one."""
    return ContextAxis(imagined(size), size, method) if size > 1 else None
