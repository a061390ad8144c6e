"""Schedules that the validator refuses, and its messages."""

from __future__ import annotations

import pytest

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Edge

GOOD = "0F0 0F1 0B0 0B1 \n 1F0 1B0 1F1 1B1"
LOWERED = schedule.to_text(schedule.lower(schedule.from_text(GOOD)))


def test_accepts_a_valid_schedule() -> None:
    schedule.validate(schedule.from_text(GOOD))
    schedule.validate(schedule.from_text(LOWERED))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0F0 0F1 0B0 0B0 0B1\n1F0 1B0 1F1 1B1", r"rank 0, position 3, 0B0: it already ran at position 2"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1", r"rank 1, position 2, 1F1: stage 1, microbatch 1 has 1F1; expected F once"),
        ("0F0 0F1 0B0 0B1\n1F0 1I0 1F1 1B1", r"has 1F0, 1I0; expected"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1W0 1F1 1B1", r"has 1F0, 1B0, 1W0; expected"),
        ("0F0 0F1 0B0 0B1 1B1\n1F0 1B0 1F1", r"rank 0, position 4, 1B1: stage 1 is placed on rank 1"),
        ("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1", r"cannot go on: rank 0, position 1, 0B0: needs the cotangent of micro"),
        ("0F0 0F1 0B0 0B1\n1F0 1B1 1F1 1B0", r"rank 1, position 1, 1B1: needs the residuals that 1F1 keeps"),
        ("0F0 0I0\n1F0 1I0 1W0\n", r"has 0F0, 0I0; expected"),
        ("0W0 0F0 0I0\n1F0 1I0 1W0\n", r"needs the residuals that 0I0 keeps"),
    ],
)
def test_refuses_broken_computation(table: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule.validate(schedule.from_text(table))
    assert "rank 0 | " in str(caught.value), "the grid is shown"


def test_marks_the_action() -> None:
    with pytest.raises(ScheduleError, match=r"rank 0 \| 0F0 >>0B0<< 0F1 0B1"):
        schedule.validate(schedule.from_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0SEND_F1,", "", r"rank 1, position 2, 1RECV_F1: its send is missing \(activation of microbatch 1 from stage 0"),
        ("1RECV_F0,", "", r"rank 0, position 1, 0SEND_F0: its receive is missing"),
        ("1SEND_B0,", "", r"rank 0, position 2, 0RECV_B0: its send is missing \(cotangent"),
        (
            "0SEND_F0,0RECV_B0,0F1,0SEND_F1",
            "0RECV_B0,0F1,0SEND_F1,0SEND_F0",
            r"rank 1 receives in a different order than rank 0 sends: rank 0, position 3, 0SEND_F1 is sent where rank 1",
        ),
        ("0RECV_B1", "0RECV_B1,0RECV_B1", r"rank 0, position 6, 0RECV_B1: it was already posted at position 5"),
    ],
)
def test_refuses_broken_communication(old: str, new: str, message: str) -> None:
    assert old in LOWERED
    with pytest.raises(ScheduleError, match=message):
        schedule.validate(schedule.from_text(LOWERED.replace(old, new)))


def test_refuses_a_transfer_of_no_value() -> None:
    with pytest.raises(ScheduleError, match=r"0SEND_F0>2: no value of microbatch 0 goes between stages 0 and 2"):
        schedule.validate(schedule.from_text("0F0 0SEND_F0 0SEND_F0>2\n1RECV_F0 1F0 1SEND_F0\n2RECV_F0 2F0"))


def test_refuses_missing_communication() -> None:
    table = LOWERED.replace("0SEND_F1,", "").replace("1RECV_F1,", "")
    with pytest.raises(ScheduleError, match=r"1F1: needs the activation of microbatch 1 .* has no send and no receive"):
        schedule.validate(schedule.from_text(table))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0UNSHARD,", "", r"0F0: the parameters of stage 0 are not gathered; expected 0UNSHARD before"),
        ("0UNSHARD,", "0UNSHARD,0UNSHARD,", r"already gathered at position 0; expected 0RESHARD in between"),
        (",0RESHARD", "", r"rank 0, position 0, 0UNSHARD: the parameters are never freed"),
        (",0REDUCE_GRAD", "", r"rank 0: the gradients of stage 0 are never reduced"),
        (",0REDUCE_GRAD", ",0REDUCE_GRAD,0REDUCE_GRAD", r"already reduced at position"),
        ("0REDUCE_GRAD,0RESHARD", "0RESHARD,0REDUCE_GRAD", r"0REDUCE_GRAD: the parameters of stage 0 are not gathered"),
        ("0F0,", "0RESHARD,0UNSHARD,0F0,0REDUCE_GRAD,", r"0B0: its gradients were already reduced"),
        (",0RESHARD", ",0RESHARD,0RESHARD", r"0RESHARD: the parameters of stage 0 are not gathered"),
    ],
)
def test_refuses_wrong_residency(old: str, new: str, message: str) -> None:
    table = schedule.to_text(schedule.lower(schedule.from_text(GOOD), unshard="once"))
    schedule.validate(schedule.from_text(table))
    assert old in table
    with pytest.raises(ScheduleError, match=message):
        schedule.validate(schedule.from_text(table.replace(old, new)))


def test_an_overlapped_forward_needs_its_backward() -> None:
    s = schedule.from_text("0F0 (0F1;0B0)OVERLAP_F_B 0B1")
    schedule.validate(s)
    alone = schedule.from_actions([[action for action in s[0] if str(action) != "0B0"] + [schedule.parse_action("0B0")]])
    with pytest.raises(ScheduleError, match=r"0F1: marked to overlap with the next action|overlap"):
        schedule.validate(schedule.from_actions([[alone[0][0], alone[0][1], schedule.parse_action("0F2")]]))


def test_edges_that_skip_a_stage() -> None:
    edges = [Edge(0, 1), Edge(1, 2), Edge(0, 2)]
    s = schedule.build("1f1b", num_ranks=3, num_microbatches=3)
    lowered = schedule.lower(s, edges)
    schedule.validate(lowered, edges)
    assert "0SEND_F0>2" in schedule.to_text(lowered) and "2RECV_F0<0" in schedule.to_text(lowered)
    assert schedule.from_text(schedule.to_text(lowered), s.name) == lowered


def test_forward_only_edges_send_nothing_back() -> None:
    edges = [Edge(0, 1, needs_grad=False), Edge(1, 2)]
    lowered = schedule.lower(schedule.build("gpipe", num_ranks=3, num_microbatches=2), edges)
    schedule.validate(lowered, edges)
    assert "1SEND_B" not in schedule.to_text(lowered) and "2SEND_B" in schedule.to_text(lowered)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([Edge(0, 9)], r"edge \(0, 9\): expected a stage and a later one, of 0 to 1"),
        ([Edge(1, 1)], r"edge \(1, 1\): expected"),
        ([Edge(0, 1), Edge(0, 1)], r"edge \(0, 1\) is given twice"),
    ],
)
def test_invalid_edges_are_refused(edges: list[Edge], message: str) -> None:
    for use in (schedule.validate, schedule.lower, lambda s, e: schedule.simulate(s, edges=e)):
        with pytest.raises(ScheduleError, match=message):
            use(schedule.from_text("0F0 0B0\n1F0 1B0"), edges)
