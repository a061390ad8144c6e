"""Named schedules: laws over generated sizes, and the closed forms of the literature."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Kind

sizes = st.integers(min_value=1, max_value=9)
names = st.sampled_from(schedule.names())


@given(names, sizes, sizes)
def test_valid_in_every_form(name: str, num_ranks: int, num_microbatches: int) -> None:
    s = schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    schedule.validate(s)
    schedule.validate(schedule.lower(s))
    schedule.validate(s.forward_form())
    schedule.validate(schedule.lower(s.forward_form()))
    assert schedule.lower(s).compute_form() == s


@given(names, sizes, sizes, st.integers(0, 3))
def test_lowering_changes_no_times(name: str, num_ranks: int, num_microbatches: int, prefetch: int) -> None:
    s = schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    lowered = schedule.lower(s, prefetch=prefetch)
    schedule.validate(lowered)
    assert schedule.simulate(lowered).makespan == schedule.simulate(s).makespan


@given(names, sizes, sizes, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_makespan_is_the_closed_form(name: str, num_ranks: int, num_microbatches: int, f: int, i: int, w: int) -> None:
    """(m + p - 1)(F + I + W): engines without communication, both schedules (Narayanan et al. 2021, section 2.2)."""
    s = schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    timeline = schedule.simulate(s, schedule.Costs(F=f, I=i, W=w))
    assert timeline.makespan == (num_microbatches + num_ranks - 1) * (f + i + w)
    idle = (num_ranks - 1) / (num_microbatches + num_ranks - 1)
    assert timeline.bubble_fraction == pytest.approx(idle)


@given(sizes, sizes)
def test_1f1b_bounds_activations(num_ranks: int, num_microbatches: int) -> None:
    s = schedule.build("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches)
    expected = tuple(min(num_ranks - rank, num_microbatches) for rank in range(num_ranks))
    assert schedule.simulate(s).peak_activations == expected


@given(sizes, sizes)
def test_gpipe_keeps_all_activations(num_ranks: int, num_microbatches: int) -> None:
    s = schedule.build("gpipe", num_ranks=num_ranks, num_microbatches=num_microbatches)
    assert schedule.simulate(s).peak_activations == (num_microbatches,) * num_ranks


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "makespan"), [(4, 8, 33), (8, 32, 117)])
def test_1f1b_exact_numbers(num_ranks: int, num_microbatches: int, makespan: int) -> None:
    s = schedule.build("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches)
    assert schedule.simulate(s).makespan == makespan
    assert schedule.simulate(s, schedule.Costs(F=1, I=1.2, W=0.8)).makespan == pytest.approx(makespan)


def test_1f1b_row_by_hand() -> None:
    s = schedule.build("1f1b", num_ranks=3, num_microbatches=4)
    assert [" ".join(map(str, row)) for row in s] == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


@pytest.mark.parametrize("spelling", ["1F1B", "1f1b", "1-f-1-b", "Schedule1F1B"])
def test_spellings(spelling: str) -> None:
    assert schedule.normalise(spelling) == "1f1b"


def test_unknown_name_suggests() -> None:
    with pytest.raises(ScheduleError, match=r"unknown schedule '1f1': did you mean 1f1b\?"):
        schedule.build("1f1", num_ranks=2, num_microbatches=2)


@pytest.mark.parametrize("numbers", [{"num_ranks": 0, "num_microbatches": 1}, {"num_ranks": 1, "num_microbatches": 0}])
def test_numbers_below_one(numbers: dict[str, int]) -> None:
    with pytest.raises(ScheduleError, match="expected at least 1"):
        schedule.build("gpipe", **numbers)


def test_stages_per_rank_that_the_construction_does_not_have() -> None:
    with pytest.raises(ScheduleError, match="exactly 1 stage per rank; with 2 ranks the model must be split into 2"):
        schedule.build("1f1b", num_ranks=2, num_microbatches=2, stages_per_rank=2)


def test_forward_form_has_forwards_only() -> None:
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=3).forward_form()
    assert s.is_forward_only
    assert {action.kind for row in s for action in row} == {Kind.F}
