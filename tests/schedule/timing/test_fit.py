"""Costs fitted to a timeline, and schedules with every backward split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Costs, Kind

times = st.lists(st.floats(0.5, 4, width=16), min_size=12, max_size=12)


@given(st.sampled_from(["zb_h1", "zb_h2", "interleaved_zb", "zbv", "v_half"]), st.integers(1, 2), st.integers(2, 8), times)
def test_fitting_a_simulated_run_returns_its_costs(name: str, p: int, m: int, costs: list[float]) -> None:
    s = schedule.build(name, num_ranks=p, num_microbatches=m)
    f, i, w = np.array(costs).reshape(3, 4)[:, : s.num_stages]
    found = schedule.costs_of(schedule.simulate(s, Costs(f, i, w)))
    assert pytest.approx(f.tolist()) == found.F and pytest.approx(i.tolist()) == found.I
    assert pytest.approx(w.tolist()) == found.W and found.comm == 0


def test_transfer_times_come_from_ranks_that_waited() -> None:
    s = schedule.build("1f1b", num_ranks=3, num_microbatches=4)
    assert schedule.costs_of(schedule.simulate(s, Costs(comm=0.25))).comm == pytest.approx(0.25)


@given(st.sampled_from(schedule.names()), st.integers(2, 4), st.integers(4, 8))
def test_time_between_computations_is_measured(name: str, p: int, m: int) -> None:
    s = schedule.lower(schedule.build(name, num_ranks=p, num_microbatches=m + p), merge=False)
    given = Costs(2, 3, 1, comm=0.25, send=0.125, receive=0.0625, between=0.03125)
    found = schedule.costs_of(schedule.simulate(s, given))
    assert (found.send, found.receive, found.between) == pytest.approx((given.send, given.receive, given.between))
    assert found.comm == pytest.approx(0.25)


def test_a_backward_that_is_never_split_counts_as_w() -> None:
    found = schedule.costs_of(schedule.simulate(schedule.build("1f1b", num_ranks=2, num_microbatches=3), Costs(1, 2, 3)))
    assert (found.F, found.I, found.W) == ([1, 1], [0, 0], [5, 5])


def test_forwards_alone_have_no_costs_of_backwards() -> None:
    with pytest.raises(ScheduleError, match="no forward and backward of stage 0"):
        schedule.costs_of(schedule.simulate(schedule.build("gpipe", num_ranks=2, num_microbatches=2).forward_form()))


@given(st.sampled_from(schedule.names()), st.integers(1, 3), st.integers(1, 4))
def test_split_form(name: str, p: int, m: int) -> None:
    s = schedule.build(name, num_ranks=p, num_microbatches=m + 2 * p).split_form()
    schedule.validate(s.without_overlap())
    assert not any(action.kind is Kind.B for row in s for action in row)
    lowered = schedule.lower(s, merge=False)
    schedule.validate(lowered)
    assert not any(action.kind is Kind.B for row in lowered for action in row)


def test_spread_over_microbatches_is_measured() -> None:
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=40)
    plain = schedule.simulate(s, Costs(2, 2, 2))
    assert schedule.costs_of(plain).spread == pytest.approx(0, abs=1e-9)
    noise = np.random.default_rng(0)
    longer = tuple(
        np.where(row.table[:, 1] <= Kind.W, end + (end - start) * 0.2 * noise.standard_normal(len(end)), end)
        for row, start, end in zip(s, plain.start, plain.end, strict=True)
    )
    found = schedule.costs_of(schedule.Timeline(s, plain.start, longer))
    assert found.spread == pytest.approx(0.2, rel=0.25) and pytest.approx([2, 2], rel=0.1) == found.F


def test_timing_noise_makes_a_step_longer() -> None:
    s = schedule.build("1f1b", num_ranks=4, num_microbatches=16)
    simulated = schedule.simulate(s, Costs()).makespan
    assert schedule.expected_makespan(s, Costs(), samples=3) == pytest.approx(simulated), "without a spread, nothing"
    little, much = (schedule.expected_makespan(s, Costs(spread=spread)) for spread in (0.05, 0.2))
    assert simulated < little < much < 1.5 * simulated
    assert schedule.expected_makespan(s, Costs(spread=0.2)) == much, "the same draws every time"
    alone = schedule.build("1f1b", num_ranks=1, num_microbatches=64)
    expected = schedule.simulate(alone, Costs()).makespan
    assert schedule.expected_makespan(alone, Costs(spread=0.2)) == pytest.approx(expected, rel=0.02), "nobody waits"
    with pytest.raises(ScheduleError, match="expected a fraction"):
        schedule.expected_makespan(s, Costs(spread=-1))
