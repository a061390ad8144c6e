"""When the values of a program are used last, so that each can be let go of."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def last_uses(steps: Sequence[tuple[Value, Iterable[Value]]], kept: Container[Value] = ()) -> list[list[Value]]:
    """For each step, the values that no later step reads; what a step makes and nobody reads is among its own.

    Args:
        steps: what each makes, and what it reads, in the order in which they run.
        kept: values that are needed after the last step.
    """
    last: dict[Value, int] = {}
    for position, (made, read) in enumerate(steps):
        last[made] = position
        last.update(dict.fromkeys(read, position))
    done: list[list[Value]] = [[] for _ in steps]
    for value, position in last.items():
        if value not in kept:
            done[position].append(value)
    return done
