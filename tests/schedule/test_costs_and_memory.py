"""Costs of links, bytes alive, and why ranks idle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Costs, Edge, Memory

TWO = "0F0 0B0\n1F0 1B0"


def makespan(table: str, costs: Costs) -> float:
    s = schedule.from_text(table)
    # receives posted as early as can be: a transfer begins when both ends are posted
    compute, lowered = schedule.simulate(s, costs), schedule.simulate(schedule.lower(s, receive_ahead=9), costs)
    assert compute.makespan == pytest.approx(lowered.makespan)
    return compute.makespan


def test_transfers_of_one_edge_follow_each_other() -> None:
    table = "0F0 0F1 0F2\n1F0 1F1 1F2"
    assert makespan(table, Costs(comm=5)) == 1 + 3 * 5 + 1
    assert makespan(table, Costs(latency=5)) == 3 + 5 + 1, "latencies overlap"


def test_ranks_share_one_wire() -> None:
    """Rank 0 sends rank 1 all activations of both its stages: 3 stages of 8 microbatches, one after the other."""
    s = schedule.build("interleaved_1f1b", num_ranks=2, num_microbatches=8)
    assert (
        schedule.simulate(s, Costs(comm=10)).makespan >= 24 * 10 / 2 and schedule.simulate(s, Costs(comm=10)).makespan > 204
    )


def test_the_span_of_a_lowered_schedule_is_that_of_its_computations() -> None:
    for name in ("zb_h2", "zbv"):
        s = schedule.build(name, num_ranks=4, num_microbatches=16)
        lowered = schedule.simulate(schedule.lower(s, unshard="once"))
        assert lowered.span_bubble_fraction == pytest.approx(schedule.simulate(s).span_bubble_fraction)
        assert lowered.makespan == schedule.simulate(s).makespan


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([Edge(0, 9)], r"edge \(0, 9\): expected a stage and a later one, of 0 to 1"),
        ([Edge(1, 1)], r"edge \(1, 1\): expected"),
        ([Edge(0, 1), Edge(0, 1)], r"edge \(0, 1\) is given twice"),
    ],
)
def test_edges_that_do_not_fit(edges: list[Edge], message: str) -> None:
    for use in (schedule.validate, schedule.lower, lambda s, e: schedule.simulate(s, edges=e)):
        with pytest.raises(ScheduleError, match=message):
            use(schedule.from_text(TWO), edges)


def test_a_transfer_waits_for_its_receive() -> None:
    s = schedule.from_text("0F0 0F1\n1F0 1F1")
    costs = Costs(F=(1, 3), latency=2)
    assert schedule.simulate(schedule.lower(s, receive_ahead=1), costs).makespan == 1 + 2 + 3 + 3
    assert schedule.simulate(schedule.lower(s, receive_ahead=0), costs).makespan == 1 + 2 + 3 + 2 + 3


def test_costs_of_single_edges() -> None:
    assert makespan(TWO, Costs(comm={(0, 1): 3})) == 6 + 3
    assert makespan(TWO, Costs(comm={(0, 1): 3, (1, 0): 4})) == 6 + 7


def test_what_does_not_overlap_holds_the_sender_up() -> None:
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
        (Costs(latency=-1), "cannot be negative"),
        (Costs(F=float("inf")), "without bound"),
    ],
)
def test_links_that_do_not_fit(costs: Costs, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.simulate(schedule.from_text(TWO), costs)


def test_live_bytes_by_hand() -> None:
    s = schedule.from_text("0F0 0I0 0W0\n1F0 1I0 1W0")
    memory = Memory(residuals=100, weight_residuals=60, output=7, accumulators=1000)
    lowered = schedule.lower(s)
    assert [str(action) for action in lowered[0]] == ["0RECV_B0", "0F0", "0SEND_F0", "0B0"], "I and W are one"
    assert schedule.live_bytes(lowered, memory)[0].tolist() == [7, 114, 114, 1000], (
        "the send is complete when its answer is there"
    )
    assert [str(action) for action in lowered[1]] == ["1RECV_F0", "1F0", "1I0", "1SEND_B0", "1W0"]
    assert schedule.live_bytes(s, memory)[1].tolist() == [7, 100, 1067, 1067, 1007], "nothing proves the last send complete"
    assert schedule.peak_bytes(s, memory) == (1000, 1067)


@given(st.sampled_from(schedule.names()), st.integers(1, 5), st.integers(1, 8))
def test_bytes_count_activations(name: str, p: int, m: int) -> None:
    """With one byte per residual and nothing else, live bytes are the activations that a timeline counts."""
    s = schedule.build(name, num_ranks=p, num_microbatches=m + 2 * p)
    live = schedule.live_bytes(s, Memory(residuals=1, weight_residuals=1))
    assert tuple(row.max() for row in live) == schedule.simulate(schedule.lower(s)).peak_activations
    assert all(row[-1] == 0 for row in live)


@pytest.mark.parametrize("memory", [Memory((1, 2), 1), Memory(1, 1, output=-1)])
def test_memory_that_does_not_fit(memory: Memory) -> None:
    with pytest.raises(ScheduleError, match=r"Memory\.\w+(=| has shape)"):
        schedule.peak_bytes(schedule.build("1f1b", num_ranks=3, num_microbatches=2), memory)


times = st.floats(0.125, 4, width=16)


@given(
    st.sampled_from(schedule.names()),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(times, min_size=24, max_size=24),
    times,
)
def test_idle_time_is_explained(name: str, p: int, m: int, costs: list[float], comm: float) -> None:
    s = schedule.build(name, num_ranks=p, num_microbatches=m + 2 * p)
    f, i, w = np.array(costs).reshape(3, 8)[:, : s.num_stages]
    timeline = schedule.simulate(s, Costs(f, i, w, comm=comm))
    for busy, idle in zip(timeline.busy, schedule.explain_idle(timeline), strict=True):
        assert min(idle) >= -1e-9
        assert busy + idle.total == pytest.approx(timeline.makespan)


def test_causes_of_idle_time() -> None:
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=4)
    even, free = Costs(1, 1, 1), schedule.Idle(3, 0, 0)
    assert schedule.explain_idle(schedule.simulate(s, even)) == (free, free)
    slow = schedule.explain_idle(schedule.simulate(s, Costs((1, 2), (1, 2), (1, 2))))
    assert slow[0].imbalance == 12 and slow[1].imbalance == 0 and slow[0].communication == 0
    wired = schedule.explain_idle(schedule.simulate(s, Costs(comm=1)))
    assert wired[0].communication > 0 and wired[0].dependency == 3
