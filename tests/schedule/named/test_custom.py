"""A user's own schedule, from a function or a file, used like a named one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autofunc import schedule
from autofunc.errors import ScheduleError


def backwards_first(num_ranks: int, num_microbatches: int) -> Any:
    """One microbatch at a time."""
    return [[f"{rank}{kind}{mb}" for mb in range(num_microbatches) for kind in "FB"] for rank in range(num_ranks)]


def test_a_function() -> None:
    s = schedule.build(backwards_first, num_ranks=3, num_microbatches=2)
    assert s.name == "backwards_first" and s.num_stages == 3 and s.in_order
    assert schedule.simulate(s).makespan == 2 * 3 * 3


@pytest.mark.parametrize("made", ["0F0 0B0", [[schedule.parse_action("0F0"), "0B0"]], schedule.from_text("0F0 0B0")])
def test_what_a_function_may_return(made: Any) -> None:
    s = schedule.build(lambda num_ranks, num_microbatches: made, num_ranks=1, num_microbatches=1)
    assert schedule.to_text(s) == "0F0,0B0\n"


def test_stages_per_rank_is_passed_if_named() -> None:
    def looped(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> schedule.Schedule:
        return schedule.build(
            "looped_bfs", num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank
        )

    assert schedule.build(looped, num_ranks=2, num_microbatches=2, stages_per_rank=3).num_stages == 6


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("0F0 0B0", r"the schedule is for 1 ranks, 1 microbatches; asked for 1 ranks, 2 microbatches"),
        ("0F0 0F1 0B0", r"function mine: rank 0, position 1, 0F1: stage 0, microbatch 1 has 0F1; expected F once"),
        (["0F0 0F1 0B0"], r"function mine: rank 0, position 1, 0F1"),
        (None, "function mine returned NoneType; expected a Schedule"),
        ([3], "3 is not a list of actions"),
        ([[3]], "3 is not an action; expected an Action or its text"),
    ],
)
def test_invalid_results_are_refused(made: Any, message: str) -> None:
    def mine(num_ranks: int, num_microbatches: int) -> Any:
        return made

    with pytest.raises(ScheduleError, match=message):
        schedule.build(mine, num_ranks=1, num_microbatches=2)


def test_a_function_with_other_argument_names_is_refused() -> None:
    def mine(p: int, m: int) -> str:
        return "0F0 0B0"

    with pytest.raises(ScheduleError, match=r"function mine.* cannot make a schedule: .* called with num_ranks, num_micro"):
        schedule.build(mine, num_ranks=1, num_microbatches=1)


def test_a_file(tmp_path: Path) -> None:
    built = schedule.build("zb_h1", num_ranks=2, num_microbatches=3)
    for write, name in ((schedule.to_csv, "mine.csv"), (schedule.to_json, "mine.json")):
        write(schedule.lower(built), tmp_path / name)
        read = schedule.build(tmp_path / name, num_ranks=2, num_microbatches=3)
        assert read.num_ranks == 2 and not read.is_lowered
        with pytest.raises(ScheduleError, match=f"{name}: the schedule is for 2 ranks, 3 micro.*; asked for 4 ranks"):
            schedule.build(str(tmp_path / name), num_ranks=4, num_microbatches=3)
