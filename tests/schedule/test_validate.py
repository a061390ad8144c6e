"""What the validator refuses, and what its messages say."""

from __future__ import annotations

import pytest

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Edge
from autofunc.schedule.walk import walk

GOOD = "0F0 0F1 0B0 0B1 \n 1F0 1B0 1F1 1B1"
LOWERED = schedule.to_text(schedule.lower(schedule.from_text(GOOD)))


def test_accepts_the_good_one() -> None:
    schedule.validate(schedule.from_text(GOOD))
    schedule.validate(schedule.from_text(LOWERED))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0F0 0F1 0B0 0B0 0B1\n1F0 1B0 1F1 1B1", r"rank 0, position 3, 0B0: it ran before, at position 2"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1F1", r"stage 1, microbatch 1 on rank 1: found 1F1; expected F once"),
        ("0F0 0F1 0B0 0B1\n1F0 1I0 1F1 1B1", r"found 1F0, 1I0; expected"),
        ("0F0 0F1 0B0 0B1\n1F0 1B0 1W0 1F1 1B1", r"found 1F0, 1B0, 1W0; expected"),
        ("0F0 0F1 0B0 0B1 1B1\n1F0 1B0 1F1", r"rank 0, position 4, 1B1: stage 1 is placed on rank 1"),
        ("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1", r"cannot go on: rank 0, position 1, 0B0: needs the cotangent of micro"),
        ("0F0 0F1 0B0 0B1\n1F0 1B1 1F1 1B0", r"rank 1, position 1, 1B1: needs the residuals that 1F1 keeps"),
        ("0F0 0I0\n1F0 1I0 1W0\n", r"found 0F0, 0I0"),
        ("0W0 0F0 0I0\n1F0 1I0 1W0\n", r"needs the residuals that 0I0 keeps"),
    ],
)
def test_refuses(table: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule.validate(schedule.from_text(table))
    assert "rank 0 | " in str(caught.value), "the grid is shown"


def test_marks_the_action() -> None:
    with pytest.raises(ScheduleError, match=r"rank 0 \| 0F0 >>0B0<< 0F1 0B1"):
        schedule.validate(schedule.from_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0SEND_F1,", "", r"1RECV_F1 at position 2 receives, but whose send is not posted"),
        ("1RECV_F0,", "", r"needs the activation of microbatch 0 from stage 0 to stage 1, which no action of rank 1 makes"),
        ("1SEND_B0,", "", r"rank 0 receives 0RECV_B0|disagree on the order"),
        (
            "0SEND_F0,0RECV_B0,0F1,0SEND_F1",
            "0RECV_B0,0F1,0SEND_F1,0SEND_F0",
            r"sends 0SEND_F1 .* where rank 1 receives 1RECV_F0",
        ),
        ("0RECV_B1", "0RECV_B1,0RECV_B1", r"has no send at the other end"),
    ],
)
def test_refuses_broken_communication(old: str, new: str, message: str) -> None:
    assert old in LOWERED
    with pytest.raises(ScheduleError, match=message):
        schedule.validate(schedule.from_text(LOWERED.replace(old, new)))


def test_an_unused_value_is_left_over() -> None:
    with pytest.raises(ScheduleError, match="rank 0: left over at the end: the residuals that 0F0 keeps"):
        list(walk(schedule.from_text("0F0\n1F0"), schedule.Dataflow(schedule.chain(2))))


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
