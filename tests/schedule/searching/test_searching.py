"""Searched schedules: valid, within their limits, never worse than named ones, never better than possible."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Costs, Memory
from autofunc.schedule.footprint.live import peak_held
from autofunc.schedule.named.registry import named_candidates

PAPER = Costs(F=18.522, I=18.086, W=9.337, comm=0.601)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 2), st.booleans(), st.integers(0, 2**31))
def test_never_worse_than_named(p: int, m: int, v: int, span: bool, seed: int) -> None:
    rng = random.Random(seed)
    f, i, w = ([rng.uniform(0.5, 2) for _ in range(p * v)] for _ in range(3))
    costs = Costs(
        f, i, w, comm=rng.uniform(0, 0.3), latency=rng.choice((0, 0.1)), overlap=rng.choice((1, 0.5)),
        send=rng.choice((0, 0.2)), receive=rng.choice((0, 0.1)), between=rng.choice((0, 0.05)),
    )  # fmt: skip
    limit = rng.randint(p * v, 2 * p * v)
    given: dict[str, Any] = {
        "num_ranks": p, "num_microbatches": m, "memory_limit": limit, "objective": "span" if span else "makespan",
    }  # fmt: skip
    found = schedule.search(costs, **given, time_limit_s=0.1)
    schedule.validate(found)
    assert found.num_stages == p * v and found.in_order
    timeline = schedule.simulate(found, costs)
    assert max(timeline.peak_activations) <= limit

    def value(timeline: schedule.Timeline) -> float:
        return timeline.longest_span if span else timeline.makespan

    named = [schedule.simulate(candidate, costs) for candidate in named_candidates(p, m, v)]
    fitting = [value(each) for each in named if max(each.peak_activations) <= limit]
    assert value(timeline) <= min(fitting, default=float("inf")) * (1 + 1e-9)
    assert value(timeline) >= schedule.lower_bound(costs, **given) * (1 - 1e-9)


def test_the_bound_holds_for_named_schedules_without_a_limit() -> None:
    rng = random.Random(0)
    for _ in range(50):
        p, m = rng.randint(1, 6), rng.randint(1, 12)
        costs = Costs(
            *([rng.uniform(0, 2) + 0.01 for _ in range(p)] for _ in range(3)),
            comm=rng.uniform(0, 1),
            send=0.1,
            receive=0.2,
            between=0.1,
        )
        bound = schedule.lower_bound(costs, num_ranks=p, num_microbatches=m)
        for candidate in named_candidates(p, m, 1):
            assert schedule.simulate(candidate, costs).makespan >= bound - 1e-9


@pytest.mark.parametrize(
    ("microbatches", "name", "published"),
    [
        (24, "1f1b", 0.243), (32, "1f1b", 0.199), (64, "1f1b", 0.124),
        (24, "interleaved_1f1b", 0.106), (32, "interleaved_1f1b", 0.082), (64, "interleaved_1f1b", 0.044),
        (24, "zb_h1", 0.159), (32, "zb_h1", 0.124), (64, "zb_h1", 0.067),
        (24, "zb_h2", 0.108), (32, "zb_h2", 0.084), (64, "zb_h2", 0.044),
    ],
)  # fmt: skip
def test_bubble_rates_of_the_zero_bubble_paper(microbatches: int, name: str, published: float) -> None:
    """arXiv 2401.10241, 1.5B model, 8 ranks, figures as recalled from the paper; its interleaving has 3 stages per rank."""
    v = 3 if name == "interleaved_1f1b" else 1
    s = schedule.build(name, num_ranks=8, num_microbatches=microbatches, stages_per_rank=v)
    assert abs(schedule.simulate(s, PAPER.scaled(1 / v)).span_bubble_fraction - published) < 0.02


@pytest.mark.parametrize(("microbatches", "published"), [(24, 0.043), (32, 0.004), (64, 0.003)])
def test_zb_2p_of_the_paper(microbatches: int, published: float) -> None:
    """With its memory, where W needs less than half of what F keeps; in activations it is out of reach of any schedule."""
    memory = Memory(residuals=34 + 5 * 16 * 1024 / 2304, weight_residuals=32)
    given: dict[str, Any] = {"num_ranks": 8, "num_microbatches": microbatches, "objective": "span"}
    limit = 16 * float(memory.residuals)  # type: ignore[arg-type]
    found = schedule.search(PAPER, **given, memory=memory, memory_limit=limit, time_limit_s=3.0)
    assert max(peak_held(found, [memory.residuals] * 8, [32.0] * 8)) <= limit  # type: ignore[list-item]
    assert schedule.simulate(found, PAPER).span_bubble_fraction < 0.108, "better than ZB-H2"
    work = microbatches * (18.522 + 18.086 + 9.337)
    assert 1 - work / schedule.lower_bound(PAPER, **given, memory=memory, memory_limit=limit) < published + 0.001
    assert 1 - work / schedule.lower_bound(PAPER, **given, memory_limit=16) > published + 0.03


@pytest.mark.parametrize(("p", "v", "m", "limit"), [(2, 2, 4, 2), (4, 2, 8, 2), (3, 3, 6, 3), (4, 4, 8, 8)])
def test_the_tightest_limits_have_a_schedule(p: int, v: int, m: int, limit: int) -> None:
    found = schedule.search(
        Costs(), num_ranks=p, num_microbatches=m, stages_per_rank=v, memory_limit=limit, time_limit_s=0.3
    )
    schedule.validate(found)
    assert max(schedule.simulate(found).peak_activations) <= limit


@pytest.mark.parametrize(
    ("costs", "options", "message"),
    [
        (Costs(), {"memory_limit": 0.5}, "memory_limit=0.5 on rank 0: one microbatch alone needs 1 there"),
        (Costs(), {"memory_limit": [4, 4, 4]}, "memory_limit has 3 values; expected one, or one for each of 2 ranks"),
        (Costs(F=(1, 1, 1)), {}, r"costs are given for \[3\] stages; expected a multiple of num_ranks=2"),
        (Costs(F=(1, 1), I=(1, 1, 1, 1)), {}, r"costs are given for \[2, 4\] stages"),
        (Costs(), {"num_microbatches": 0}, "num_microbatches=0, expected at least 1"),
        (Costs(), {"num_ranks": 0}, "num_ranks=0, expected at least 1"),
        (Costs(), {"stages_per_rank": 0}, "stages_per_rank=0, expected at least 1"),
        (Costs(), {"objective": "bubble"}, "objective='bubble'; .*makespan"),
        (Costs(), {"memory_limit": float("nan")}, "memory_limit=nan on rank 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(costs: Costs, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.search(costs, **({"num_ranks": 2, "num_microbatches": 4, "time_limit_s": 0.1} | options))


def test_progress_is_reported() -> None:
    told: list[tuple[float, float]] = []
    costs = Costs((1, 2), (3, 1), (1, 2), comm=0.3)
    limits: dict[str, Any] = {"num_ranks": 2, "num_microbatches": 9, "memory_limit": 2}
    found = schedule.search(
        costs, **limits, time_limit_s=0.6, on_progress=lambda elapsed, best: told.append((elapsed, best))
    )
    elapsed, best = zip(*told, strict=True)
    assert elapsed[0] > 0.1 and list(elapsed) == sorted(elapsed) and len(told) <= 6, "each tenth of a second at most"
    assert list(best) == sorted(best, reverse=True) and best[-1] >= schedule.simulate(found, costs).makespan
    assert best[0] > schedule.lower_bound(costs, **limits)
