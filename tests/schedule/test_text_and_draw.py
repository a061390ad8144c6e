"""The text form of actions and tables, and pictures in text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Action, Kind


@given(st.integers(0, 200), st.sampled_from(list(Kind)), st.integers(0, 5000), st.integers(0, 200))
def test_action_round_trip(stage: int, kind: Kind, microbatch: int, peer: int) -> None:
    action = Action(stage, kind, microbatch) if kind.is_compute else Action(stage, kind, microbatch, peer)
    if kind.is_sharding:
        action = Action(stage, kind, -1)
    assert schedule.parse_action(str(action)) == action


@pytest.mark.parametrize("text", ["2F0", "1SEND_F3", "3RECV_B12"])
def test_torch_spelling(text: str) -> None:
    assert str(schedule.parse_action(text)) == text


@pytest.mark.parametrize(
    ("text", "message"), [("F0", "is not an action"), ("0SEND0", r"did you mean SEND_F or SEND_B"), ("", "is not an")]
)
def test_what_is_no_action(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.parse_action(text)


@given(st.sampled_from(schedule.names()), st.integers(1, 6), st.integers(1, 6))
def test_table_round_trip(name: str, num_ranks: int, num_microbatches: int) -> None:
    s = schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches + 2 * num_ranks)
    for form in (s, schedule.lower(s), schedule.lower(s, unshard="each_use", keep_overlapped=True)):
        assert schedule.from_text(schedule.to_text(form), name) == form


def test_a_stage_without_forward() -> None:
    with pytest.raises(ScheduleError, match=r"no rank runs the forward of stage \[1\]"):
        schedule.from_text("0F0 2F0")


def test_out_of_order_backwards_are_noticed() -> None:
    assert not schedule.from_text("0F0 0F1 0B1 0B0").in_order
    assert schedule.from_text("0F0 0F1 0B0 0B1").in_order


def test_picture() -> None:
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=3)
    assert schedule.draw(s).splitlines() == [
        "rank 0 | 0 1 ....[0 ]2 [1 ]..[2 ]",
        "rank 1 | ..0 [0 ]1 [1 ]2 [2 ]....",
        "0 forward   [0 ] backward   . idle",
    ]


@given(st.sampled_from(schedule.names()), st.integers(1, 12), st.integers(1, 40), st.booleans())
def test_pictures_fit_the_width(name: str, num_ranks: int, num_microbatches: int, colour: bool) -> None:
    s = schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches + 2 * num_ranks)
    plain = re.sub("\x1b\\[[0-9;]*m", "", schedule.draw(s, width=80, colour=colour))
    assert plain == schedule.draw(s, width=80)
    assert max(map(len, plain.splitlines())) <= 80


def test_costs_per_stage_shape_the_picture() -> None:
    s = schedule.from_text("0F0 0I0 0W0\n1F0 1I0 1W0")
    timeline = schedule.simulate(s, schedule.Costs(F=(1, 2), I=(1, 2), W=(1, 2)))
    assert schedule.draw(timeline).splitlines()[:2] == ["rank 0 | 0 ........i0w0", "rank 1 | ..0   i0  w0  "]
    assert timeline.makespan == 7 and timeline.busy == (3, 6)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (schedule.Costs(F=(1,)), r"Costs.F has shape \(1,\); expected a number, or one for each of 2 stages"),
        (schedule.Costs(W=-1), "a time cannot be negative"),
        (schedule.Costs(F=0, I=0, W=0), "nothing takes any time"),
        (schedule.Costs(comm=(1, 2)), "Costs.comm has shape"),
    ],
)
def test_costs_that_do_not_fit(costs: schedule.Costs, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.simulate(schedule.from_text("0F0 0B0\n1F0 1B0"), costs)


def test_costs_may_be_arrays() -> None:
    s = schedule.from_text("0F0 0B0\n1F0 1B0")
    assert schedule.simulate(s, schedule.Costs(F=np.array([1.0, 2.0]))).makespan == 7


def test_communication_delays_readers() -> None:
    s = schedule.from_text("0F0 0B0\n1F0 1B0")
    costs = schedule.Costs(F=1, I=1, W=1, comm=0.5)
    assert schedule.simulate(s, costs).makespan == schedule.simulate(schedule.lower(s), costs).makespan == 7


def test_span_bubble() -> None:
    timeline = schedule.simulate(schedule.build("1f1b", num_ranks=2, num_microbatches=2))
    assert timeline.bubble_fraction == pytest.approx(1 / 3) and timeline.span_bubble_fraction == pytest.approx(1 / 3)
