"""The choice of how tokens are cut over ranks, as all that needs it is given it."""

from __future__ import annotations

from dataclasses import dataclass


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
