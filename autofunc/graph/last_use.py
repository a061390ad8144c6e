"""The last use of each value in a program, after which it can be freed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def last_uses(steps: Sequence[tuple[Value, Iterable[Value]]], kept: Container[Value] = ()) -> list[list[Value]]:
    """Return, for each step, the values that no later step reads; a value never read dies in the step that produces it.

    Args:
        steps: (value it produces, values it reads) of each, in execution order.
        kept: values needed after the last step.
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
