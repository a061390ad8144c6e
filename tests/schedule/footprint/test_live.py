"""Live bytes of schedules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Memory


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
def test_memory_of_a_wrong_number_of_stages_is_refused(memory: Memory) -> None:
    with pytest.raises(ScheduleError, match=r"Memory\.\w+(=| has shape)"):
        schedule.peak_bytes(schedule.build("1f1b", num_ranks=3, num_microbatches=2), memory)
