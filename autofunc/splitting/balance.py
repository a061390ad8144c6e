"""The best contiguous partition of a row of costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autofunc.errors import SplitError


def balance(costs: Sequence[float], num_parts: int) -> list[int]:
    """Cut a row of costs into contiguous, non-empty parts so that the largest part is as small as possible.

    Among equally good partitions, the one with the smallest sum of squares is chosen. Dynamic programming over
    (parts, end); O(num_parts * n^2).

    Args:
        costs: cost of each item, in any one unit.
        num_parts: number of parts.

    Returns:
        The start positions of the parts after the first.

    Raises:
        SplitError: if there are fewer items than parts.
    """
    n = len(costs)
    if not 1 <= num_parts <= n:
        raise SplitError(f"cannot split {n} layers into {num_parts} stages; expected 1 to {n}")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    unreachable = (math.inf, math.inf)
    best = [(0.0, 0.0) if end == 0 else unreachable for end in range(n + 1)]
    choices: list[list[int]] = []
    for _ in range(num_parts):
        following, choice = [unreachable] * (n + 1), [0] * (n + 1)
        for end in range(1, n + 1):
            for begin in range(end):
                part = before[end] - before[begin]
                value = (max(best[begin][0], part), best[begin][1] + part * part)
                if best[begin] != unreachable and value < following[end]:
                    following[end], choice[end] = value, begin
        best = following
        choices.append(choice)
    starts, end = [], n
    for choice in reversed(choices):
        end = choice[end]
        starts.append(end)
    return sorted(start for start in starts if start > 0)
