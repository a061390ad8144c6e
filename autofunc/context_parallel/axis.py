"""The ranks that share tokens, and how their attention exchanges keys and values: one value, passed to all that need it."""

from __future__ import annotations

from dataclasses import dataclass

from autofunc.context_parallel.ranks import imagined


@dataclass(frozen=True)
class ContextAxis:
    """Ranks that share the tokens of a microbatch.

    Args:
        ranks: their name, see `ranks.known_as`.
        size: how many they are.
        method: how attention exchanges keys and values, see `attention.METHODS`.
    """

    ranks: str
    size: int
    method: str


def imagined_axis(size: int, method: str) -> ContextAxis | None:
    """Return an axis of ranks that do not exist, for graphs that are only inspected; None for a single rank."""
    return ContextAxis(imagined(size), size, method) if size > 1 else None
