"""Costs of computations and transfers, and the times they lead to."""

from __future__ import annotations

import numpy as np
import pytest

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Costs

TWO = "0F0 0B0\n1F0 1B0"


def makespan(table: str, costs: Costs) -> float:
    s = schedule.from_text(table)
    # receives posted as early as can be: a transfer begins when both ends are posted
    compute, lowered = schedule.simulate(s, costs), schedule.simulate(schedule.lower(s, receive_ahead=9), costs)
    assert compute.makespan == pytest.approx(lowered.makespan)
    return compute.makespan


def test_transfers_of_one_edge_queue() -> None:
    table = "0F0 0F1 0F2\n1F0 1F1 1F2"
    assert makespan(table, Costs(comm=5)) == 1 + 3 * 5 + 1
    assert makespan(table, Costs(latency=5)) == 3 + 5 + 1, "latencies overlap"


def test_ranks_share_one_wire() -> None:
    """Rank 0 sends rank 1 all activations of both its stages: 3 stages of 8 microbatches, one after the other."""
    s = schedule.build("interleaved_1f1b", num_ranks=2, num_microbatches=8)
    assert (
        schedule.simulate(s, Costs(comm=10)).makespan >= 24 * 10 / 2 and schedule.simulate(s, Costs(comm=10)).makespan > 204
    )


def test_posts_do_not_lengthen_the_span_of_a_lowered_schedule() -> None:
    for name in ("zb_h2", "zbv"):
        s = schedule.build(name, num_ranks=4, num_microbatches=16)
        lowered = schedule.simulate(schedule.lower(s, unshard="once"))
        assert lowered.span_bubble_fraction == pytest.approx(schedule.simulate(s).span_bubble_fraction)
        assert lowered.makespan == schedule.simulate(s).makespan


def test_a_transfer_waits_for_its_receive() -> None:
    s = schedule.from_text("0F0 0F1\n1F0 1F1")
    costs = Costs(F=(1, 3), latency=2)
    assert schedule.simulate(schedule.lower(s, receive_ahead=1), costs).makespan == 1 + 2 + 3 + 3
    assert schedule.simulate(schedule.lower(s, receive_ahead=0), costs).makespan == 1 + 2 + 3 + 2 + 3


def test_costs_of_single_edges() -> None:
    assert makespan(TWO, Costs(comm={(0, 1): 3})) == 6 + 3
    assert makespan(TWO, Costs(comm={(0, 1): 3, (1, 0): 4})) == 6 + 7


def test_the_part_of_a_transfer_that_does_not_overlap_holds_up_the_sender() -> None:
    table = "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1"
    alone = makespan(table, Costs(comm=2))
    assert makespan(table, Costs(comm=2, overlap=0.5)) == alone + 1
    busy = schedule.simulate(schedule.lower(schedule.from_text(table)), Costs(comm=2, overlap=0)).busy
    assert busy == (6, 6), "sending is no computation"


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs(overlap=2), "Costs.overlap=2: expected a fraction"),
        (Costs(comm={(0, 7): 1}), r"names the edge \(0, 7\); there are stages 0 to 1"),
        (Costs(latency=-1), "finite and not negative"),
        (Costs(F=float("inf")), "finite and not negative"),
    ],
)
def test_invalid_transfer_costs_are_refused(costs: Costs, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.simulate(schedule.from_text(TWO), costs)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (schedule.Costs(F=(1,)), r"Costs.F has shape \(1,\); expected a number, or one for each of 2 stages"),
        (schedule.Costs(W=-1), "a time must be finite and not negative"),
        (schedule.Costs(F=0, I=0, W=0), "nothing takes any time"),
        (schedule.Costs(comm=(1, 2)), "Costs.comm has shape"),
    ],
)
def test_invalid_costs_are_refused(costs: schedule.Costs, message: str) -> None:
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


def test_time_between_computations_counts() -> None:
    """Every number is a sum of powers of two, so that sums are exact."""
    given = Costs(1, 1, 1, comm=2**-3, send=2**-4, receive=2**-5, between=2**-6)
    alone = schedule.build("1f1b", num_ranks=1, num_microbatches=5)
    assert schedule.simulate(alone, given).makespan == 5 * 3 + 9 * given.between, "one before each, but for the first"
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=1)  # 0F0 1F0 1B0 0B0, one after the other
    there_and_back = 6 + 2 * 2**-3 + 3 * given.between
    assert schedule.simulate(schedule.lower(s), given).makespan == there_and_back, "posts are over when ranks still wait"
    assert schedule.simulate(s, given).makespan == there_and_back + 2 * given.receive


def test_posts_keep_a_rank_from_computing() -> None:
    s = schedule.build("gpipe", num_ranks=2, num_microbatches=8)
    plain, busy = (schedule.simulate(schedule.lower(s), Costs(send=send, receive=send)) for send in (0.0, 0.25))
    assert busy.makespan > plain.makespan and busy.busy == plain.busy, "computations alone count as busy"
    first = busy.start[0][[action.kind is schedule.Kind.F for action in busy.schedule[0]]]
    assert (first[1:4] - first[:3] == 1.25).all(), "a forward and the post of what it made"
