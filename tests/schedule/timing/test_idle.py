"""Causes of idle time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.schedule import Costs

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
