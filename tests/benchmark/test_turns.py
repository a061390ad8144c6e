"""Timing in turns, with a clock that steps advance: no processes, no tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autofunc.benchmark.gradients import gradient_error, tolerance
from autofunc.benchmark.turns import paired_ratios, slowest, take_turns


class Clock:
    """A clock that its work advances."""

    def __init__(self) -> None:
        self.time, self.log = 0.0, ""

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log += name
            self.time += seconds

        return run


def test_contenders_take_turns() -> None:
    clock = Clock()
    steps = [clock.work("A", 1.0), clock.work("B", 3.0)]
    found = take_turns(
        steps, 3, 2, before=clock.work("|", 100.0), after=clock.work(".", 0.5), now=lambda: clock.time
    )  # fmt: skip
    assert clock.log == 3 * "|A.|A.|B.|B."
    assert found == [[[1.5, 1.5]] * 3, [[3.5, 3.5]] * 3], "what comes before is untimed, waiting for the device is not"


def test_rounds_end_when_time_is_up() -> None:
    clock = Clock()
    asked: list[int] = []

    def goes_on(done: int) -> bool:
        asked.append(done)
        return done < 2

    found = take_turns([clock.work("A", 1.0), clock.work("B", 1.0)], 9, goes_on=goes_on, now=lambda: clock.time)
    assert clock.log == "ABAB" and asked == [1, 2] and [len(each) for each in found] == [2, 2]


def test_the_slowest_process_counts_step_by_step() -> None:
    assert slowest([[[1.0, 9.0, 2.0], [1.0, 1.0, 1.0]], [[4.0, 1.0, 2.0], [2.0, 1.0, 1.0]]]) == [4.0, 1.0]
    assert paired_ratios([1.0, 2.0], [3.0, 2.0]) == [3.0, 1.0]


def test_gradients_are_compared_by_norm() -> None:
    expected = {"weight": torch.tensor([3.0, 4.0]), "zero": torch.tensor([1e-9])}
    assert gradient_error(expected, expected) == 0.0
    found = {"weight": torch.tensor([3.0, 4.5]), "zero": torch.tensor([-1e-9])}
    assert gradient_error(found, expected) == pytest.approx(0.1), "rounding of what is zero counts for little"
    assert gradient_error({}, expected) == 1.0, "what is missing counts as zero"
    assert gradient_error({}, {}) == 0.0
    assert tolerance({torch.float32}, torch.device("cpu")) < tolerance({torch.bfloat16}, torch.device("cpu"))
