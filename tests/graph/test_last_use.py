"""Values are let go of after their last use, and no earlier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofunc.graph.last_use import last_uses


def test_last_uses() -> None:
    steps = [("a", ["x"]), ("b", ["a", "x"]), ("unread", ["a"]), ("c", ["b", "b"])]
    assert [set(done) for done in last_uses(steps)] == [set(), {"x"}, {"a", "unread"}, {"b", "c"}]
    assert [set(done) for done in last_uses(steps, ["c", "x"])] == [set(), set(), {"a", "unread"}, {"b"}]
    assert last_uses([]) == []


@given(st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=12), st.sets(st.integers(0, 30)))
def test_a_run_that_lets_go_finds_all_it_reads(reads: list[list[int]], kept: set[int]) -> None:
    """Values 0 to 9 are given; step n makes value 10 + n, and reads what there is by then."""
    steps = [(10 + number, [value for value in read if value < 10 + number]) for number, read in enumerate(reads)]
    alive = set(range(10))
    for (made, read), done in zip(steps, last_uses(steps, kept), strict=True):
        assert alive.issuperset(read)
        alive.add(made)
        assert len(done) == len(set(done)) and alive.issuperset(done)
        alive -= set(done)
    touched = {value for made, read in steps for value in (made, *read)}
    everything = {*range(10), *(made for made, _ in steps)}
    assert alive == everything - (touched - kept)  # what nobody reads was never among the steps


@pytest.mark.parametrize("kept", [(), ("x",), {"x": 1}])
def test_what_is_kept_may_be_any_container(kept: object) -> None:
    (done,) = last_uses([("y", ["x"])], kept)  # type: ignore[arg-type]
    assert set(done) == ({"y"} if kept else {"x", "y"})
