"""Inserting actions between the computations of a row."""

from __future__ import annotations

from autofunc.schedule.ir import OVERLAPPED, Action, Row

Gaps = list[list[Action]]
"""Per position of a row, what is inserted right before (or right after) it."""


def insert(row: Row, before: tuple[Gaps, ...], after: tuple[Gaps, ...]) -> list[Action]:
    """Insert actions into a row; an overlapped forward and its backward stay together.

    Args:
        row: computations of a rank.
        before: inserted right before each computation, the first gaps farthest from it.
        after: inserted right after each computation, the first gaps nearest to it.
    """
    actions: list[Action] = []
    held_back: list[Action] = []
    computations = list(row)
    for position, action in enumerate(computations):
        overlapped = action.peer == OVERLAPPED
        for gaps in before:
            if not (position and computations[position - 1].peer == OVERLAPPED):
                actions += gaps[position] + (gaps[position + 1] if overlapped else [])
        actions.append(action)
        inserted = [each for gaps in after for each in gaps[position]]
        if overlapped:
            held_back = inserted
        else:
            actions += held_back + inserted
            held_back = []
    return actions
