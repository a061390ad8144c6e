"""The text form of actions and tables."""

from __future__ import annotations

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
def test_invalid_actions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.parse_action(text)


@given(st.sampled_from(schedule.names()), st.integers(1, 6), st.integers(1, 6))
def test_table_round_trip(name: str, num_ranks: int, num_microbatches: int) -> None:
    s = schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches + 2 * num_ranks)
    for form in (s, schedule.lower(s), schedule.lower(s, unshard="each_use", keep_overlapped=True)):
        assert schedule.from_text(schedule.to_text(form), name) == form


def test_a_stage_without_forward() -> None:
    with pytest.raises(ScheduleError, match=r"no rank runs the forward of stage 1"):
        schedule.from_text("0F0 2F0")


def test_out_of_order_backwards_are_detected() -> None:
    assert not schedule.from_text("0F0 0F1 0B1 0B0").in_order
    assert schedule.from_text("0F0 0F1 0B0 0B1").in_order
