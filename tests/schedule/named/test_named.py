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
    s = build(name, num_ranks, num_microbatches)
    schedule.validate(s)
    schedule.validate(s.forward_form())
    schedule.validate(schedule.lower(s.forward_form()))
    for unshard in ("never", "once", "each_use"):
        for keep in (False, True):
            lowered = schedule.lower(s, unshard=unshard, unshard_ahead=2, keep_overlapped=keep)
            schedule.validate(lowered)
            assert schedule.lower(lowered, unshard=unshard, unshard_ahead=2, keep_overlapped=keep) == lowered
            assert split(lowered.compute_form().without_overlap()) == split(s.without_overlap())


def split(s: schedule.Schedule) -> list[list[schedule.Action]]:
    """Yield the actions, with I and W for B."""
    return [
        [
            action._replace(kind=part)
            for action in row
            for part in ((Kind.I, Kind.W) if action.kind is Kind.B else (action.kind,))
        ]
        for row in s
    ]


def build(name: str, num_ranks: int, num_microbatches: int) -> schedule.Schedule:
    """Build the schedule, with at least as many microbatches as it needs."""
    if name == "dualpipe_v":
        num_microbatches += 2 * num_ranks
    return schedule.build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


@given(names, sizes, sizes, st.integers(0, 3))
def test_lowering_changes_no_times(name: str, num_ranks: int, num_microbatches: int, receive_ahead: int) -> None:
    s = build(name, num_ranks, num_microbatches)
    lowered = schedule.lower(s, receive_ahead=receive_ahead)
    schedule.validate(lowered)
    assert schedule.simulate(lowered).makespan == schedule.simulate(s).makespan


unit = st.integers(1, 4)


@given(st.sampled_from(["gpipe", "1f1b"]), sizes, sizes, unit, unit, unit)
def test_makespan_of_one_stage_per_rank(name: str, p: int, m: int, f: int, i: int, w: int) -> None:
    """(m + p - 1)(F + I + W) without communication (Narayanan et al. 2021, section 2.2.1)."""
    timeline = schedule.simulate(schedule.build(name, num_ranks=p, num_microbatches=m), schedule.Costs(F=f, I=i, W=w))
    assert timeline.makespan == (m + p - 1) * (f + i + w)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@given(st.sampled_from(["interleaved_1f1b", "looped_bfs"]), sizes, st.integers(1, 4), st.integers(2, 4), unit, unit, unit)
def test_makespan_of_several_stages_per_rank(name: str, p: int, rounds: int, v: int, f: int, i: int, w: int) -> None:
    """m(F + I + W) + (p - 1)(F + I + W) / v, F, I and W being a rank's (Narayanan et al. 2021, section 2.2.2)."""
    m = p * rounds
    s = schedule.build(name, num_ranks=p, num_microbatches=m, stages_per_rank=v)
    timeline = schedule.simulate(s, schedule.Costs(F=f / v, I=i / v, W=w / v))
    assert timeline.makespan == pytest.approx((m + (p - 1) / v) * (f + i + w))
    if name == "interleaved_1f1b":
        assert max(timeline.peak_activations) == min(m * v, p * v + p - 1)  # p (1 + (p - 1) / (p v)), in stages


@given(sizes, st.integers(0, 20), st.integers(2, 4))
def test_interleaving_never_makes_an_uneven_number_of_microbatches_worse(p: int, more: int, v: int) -> None:
    m = p + more
    plain = schedule.simulate(schedule.build("1f1b", num_ranks=p, num_microbatches=m))
    s = schedule.build("interleaved_1f1b", num_ranks=p, num_microbatches=m, stages_per_rank=v)
    costs = schedule.Costs(F=1 / v, I=1 / v, W=1 / v)
    assert schedule.simulate(s, costs).makespan <= plain.makespan + 1e-9


@given(sizes, st.integers(0, 20), st.sampled_from([0.5, 1.0, 2.0]))
def test_eager_1f1b_hides_transfers_as_long_as_a_forward(p: int, more: int, latency: float) -> None:
    """With F = B = 1, a transfer of up to 1 delays the first microbatch and the last, and no other."""
    m = 2 * p + more
    eager, plain = (
        schedule.simulate(
            schedule.build(name, num_ranks=p, num_microbatches=m), schedule.Costs(F=1, I=0.5, W=0.5, latency=latency)
        ).makespan
        for name in ("eager_1f1b", "1f1b")
    )
    fill = 2 * (p - 1) * (1 + latency)
    if latency <= 1:
        assert eager == pytest.approx(2 * m + fill)
    assert eager <= plain and (p == 1 or more < 2 * p or eager < plain)


@given(sizes, st.integers(0, 20))
def test_zb_h1_has_the_memory_of_1f1b_and_a_third_of_its_bubble(p: int, more: int) -> None:
    m = p + more
    s = schedule.build("zb_h1", num_ranks=p, num_microbatches=m)
    timeline = schedule.simulate(s)
    assert timeline.makespan == 3 * m + (p - 1)
    assert timeline.peak_activations == (p,) * p


@given(sizes, st.integers(0, 20))
def test_zb_h2_has_no_bubble_inside_a_span(p: int, more: int) -> None:
    m = 2 * p - 1 + more
    s = schedule.build("zb_h2", num_ranks=p, num_microbatches=m)
    timeline = schedule.simulate(s)
    assert timeline.makespan == 3 * m + (p - 1) and timeline.span_bubble_fraction == pytest.approx(0)
    assert timeline.peak_activations == (2 * p - 1,) * p


@pytest.mark.parametrize(
    ("name", "p", "m", "equal", "unequal", "peak", "least"),
    [
        ("gpipe", 4, 8, 33, 33, 8, 8),
        ("1f1b", 4, 8, 33, 33, 4, 1),
        ("1f1b", 8, 32, 117, 117, 8, 1),
        ("eager_1f1b", 4, 8, 33, 33, 7, 1),
        ("eager_1f1b", 8, 32, 117, 117, 15, 1),
        ("interleaved_1f1b", 4, 8, 28.5, 28.5, 5.5, 2.5),
        ("interleaved_1f1b", 8, 32, 106.5, 106.5, 11.5, 4.5),
        ("looped_bfs", 4, 8, 28.5, 28.5, 8, 8),
        ("looped_bfs", 8, 32, 106.5, 106.5, 32, 32),
        ("zb_h1", 4, 8, 27, 28.2, 4, 4),
        ("zb_h1", 8, 32, 103, 105.8, 8, 8),
        ("zb_h2", 4, 8, 27, 27, 7, 7),
        ("zb_h2", 8, 32, 103, 103, 15, 15),
        ("interleaved_zb", 4, 8, 25.5, 26.1, 4, 4),
        ("interleaved_zb", 8, 32, 99.5, 100.9, 8, 8),
        ("zbv", 4, 8, 25.5, 25.8, 4, 4),
        ("zbv", 8, 32, 99.5, 100.2, 8, 8),
        ("dualpipe_v", 4, 8, 25.5, 26.1, 4.5, 4.5),
        ("dualpipe_v", 8, 32, 99.5, 101.1, 8.5, 8.5),
    ],
)
def test_exact_numbers(name: str, p: int, m: int, equal: float, unequal: float, peak: float, least: float) -> None:
    """Time and activations per rank: equal is F = I = W = 1, unequal 1, 1.2, 0.8."""
    s = schedule.build(name, num_ranks=p, num_microbatches=m)
    v = s.num_stages // p
    timeline = schedule.simulate(s, schedule.Costs(F=1 / v, I=1 / v, W=1 / v))
    assert timeline.makespan == pytest.approx(equal)
    assert schedule.simulate(s, schedule.Costs(F=1 / v, I=1.2 / v, W=0.8 / v)).makespan == pytest.approx(unequal)
    assert (max(timeline.peak_activations) / v, min(timeline.peak_activations) / v) == (peak, least)


@given(st.integers(1, 16), st.integers(1, 40))
def test_controllable_memory(p: int, m: int) -> None:
    """Qi et al. 2024, table 1: about a half and a third of 1F1B's memory; here in stage activations, two per microbatch."""
    for name, most in (("v_half", (p + 2) // 2), ("v_min", (p + 4) // 3)):
        timeline = schedule.simulate(schedule.build(name, num_ranks=p, num_microbatches=m), schedule.Costs(0.5, 0.5, 0.5))
        assert max(timeline.peak_activations) <= 2 * most
        if m >= 2 * p:
            assert timeline.makespan <= 3 * (m + p - 1), "no slower than 1F1B"


@given(sizes, st.integers(0, 20))
def test_zbv_has_the_memory_of_1f1b_and_no_bubble_inside_a_span(p: int, more: int) -> None:
    m = 2 * p + more
    timeline = schedule.simulate(schedule.build("zbv", num_ranks=p, num_microbatches=m), schedule.Costs(0.5, 0.5, 0.5))
    assert timeline.makespan == 3 * m + (p - 1) / 2 and timeline.span_bubble_fraction == pytest.approx(0)
    assert timeline.peak_activations == (2 * p,) * p


@given(sizes, sizes, st.integers(2, 4))
def test_interleaved_zb_holds_no_more_than_its_stages_times_ranks(p: int, m: int, v: int) -> None:
    s = schedule.build("interleaved_zb", num_ranks=p, num_microbatches=m, stages_per_rank=v)
    schedule.validate(s)
    longest_round = -(-m // max(1, m // p))
    assert max(schedule.simulate(s).peak_activations) <= (v - 1) * longest_round + p


def test_dualpipe_v_names_the_microbatches_it_needs() -> None:
    with pytest.raises(ScheduleError, match="num_microbatches=7, but with 4 ranks it needs at least 8"):
        schedule.build("dualpipe_v", num_ranks=4, num_microbatches=7)


@given(names, sizes, sizes)
def test_a_rank_alone_builds_its_row(name: str, p: int, m: int) -> None:
    s = build(name, p, m)
    for rank in range(p):
        assert schedule.build_row(name, rank=rank, num_ranks=p, num_microbatches=s.num_microbatches) == s[rank]


@pytest.mark.parametrize(("name", "v"), [("zbv", 3), ("1f1b", 2), ("zb_h1", 2), ("interleaved_1f1b", 1), ("looped_bfs", 0)])
def test_unsupported_stages_per_rank_are_refused(name: str, v: int) -> None:
    with pytest.raises(ScheduleError, match=f"schedule {name}: stages_per_rank={v}, but it has"):
        schedule.build(name, num_ranks=2, num_microbatches=2, stages_per_rank=v)


@given(sizes, sizes)
def test_1f1b_bounds_activations(num_ranks: int, num_microbatches: int) -> None:
    s = schedule.build("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches)
    expected = tuple(min(num_ranks - rank, num_microbatches) for rank in range(num_ranks))
    assert schedule.simulate(s).peak_activations == expected


@given(sizes, sizes)
def test_gpipe_keeps_all_activations(num_ranks: int, num_microbatches: int) -> None:
    s = schedule.build("gpipe", num_ranks=num_ranks, num_microbatches=num_microbatches)
    assert schedule.simulate(s).peak_activations == (num_microbatches,) * num_ranks


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


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("ScheduleGPipe", "gpipe"),
        ("ScheduleInterleaved1F1B", "interleaved_1f1b"),
        ("ScheduleLoopedBFS", "looped_bfs"),
        ("ScheduleInterleavedZeroBubble", "interleaved_zb"),
        ("ScheduleZBVZeroBubble", "zbv"),
        ("ScheduleDualPipeV", "dualpipe_v"),
    ],
)
def test_torchs_class_names_are_accepted(torch_name: str, name: str) -> None:
    assert schedule.normalise(torch_name) == name


def test_unknown_name_suggests() -> None:
    with pytest.raises(ScheduleError, match=r"unknown schedule '1f1': did you mean 1f1b\?"):
        schedule.build("1f1", num_ranks=2, num_microbatches=2)


@pytest.mark.parametrize("numbers", [{"num_ranks": 0, "num_microbatches": 1}, {"num_ranks": 1, "num_microbatches": 0}])
def test_numbers_below_one(numbers: dict[str, int]) -> None:
    with pytest.raises(ScheduleError, match="expected at least 1"):
        schedule.build("gpipe", **numbers)


def test_forward_form_has_forwards_only() -> None:
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=3).forward_form()
    assert s.is_forward_only
    assert {action.kind for row in s for action in row} == {Kind.F}
