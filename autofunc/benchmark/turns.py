"""Timing steps in turns, so that all of them see the same states of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

Step = Callable[[], object]


def take_turns(
    steps: Sequence[Step],
    repetitions: int,
    steps_a_turn: int = 1,
    *,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
    goes_on: Callable[[int], bool] = lambda done: True,
    now: Callable[[], float] = time.perf_counter,
) -> list[list[list[float]]]:
    """Time steps A B C, A B C, ...; return seconds by step, repetition and number in its turn.

    Args:
        steps: the steps to time.
        repetitions: the most rounds in which each has its turn.
        steps_a_turn: how often each runs per turn: a single short step feels every hiccup of the machine.
        before: runs before each step, untimed, such as a barrier.
        after: runs after each step, as part of its time: waits for the device.
        goes_on: called with the number of finished rounds; False stops.
        now: the clock, in seconds.
    """
    found: list[list[list[float]]] = [[] for _ in steps]
    for done in range(repetitions):
        if done and not goes_on(done):
            break
        for number, step in enumerate(steps):
            turn = []
            for _ in range(steps_a_turn):
                before()
                began = now()
                step()
                after()
                turn.append(now() - began)
            found[number].append(turn)
    return found


def slowest(ranks: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Return the seconds of each turn: the slowest process counts in each step, and the median over a turn's steps.

    Args:
        ranks: a contender's seconds by process, repetition and number in the turn.

    >>> slowest([[[1.0, 5.0, 2.0]], [[3.0, 1.0, 2.0]]])
    [3.0]
    """
    turns = zip(*ranks, strict=True)
    return [statistics.median(max(each) for each in zip(*turn, strict=True)) for turn in turns]


def paired_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return how many times as long theirs took, by repetition."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]
