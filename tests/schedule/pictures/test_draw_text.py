"""Text pictures of timelines."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule


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
