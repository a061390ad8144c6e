"""Costs and memory as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Costs, Memory


def test_costs_files(tmp_path: Path) -> None:
    costs, memory = Costs((1, 2), 1, (2, 2), comm={(0, 1): 0.5}, latency=0.1), Memory((10, 20), 5, output=2)
    schedule.write_costs(tmp_path / "costs.json", costs, memory)
    read, read_memory = schedule.read_costs(tmp_path / "costs.json")
    s = schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    assert schedule.simulate(s, read).makespan == schedule.simulate(s, costs).makespan
    assert read_memory is not None and schedule.peak_bytes(s, read_memory) == schedule.peak_bytes(s, memory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a mapping with F, I and W, found list"),
        ('{"G": 1}', "unknown key 'G'"),
        ('{"F": "1"}', "F='1'; expected a number, 0 or more, or one for each stage"),
        ('{"comm": {"0-1": 1}}', "comm names the edge '0-1'; expected sending and receiving stage, such as '0>1'"),
        ('{"memory": {"residuals": 1}}', "missing 1 required positional argument: 'weight_residuals'"),
        ('{"memory": {"x": 1}}', "memory: unknown key 'x'"),
    ],
)
def test_costs_files_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ScheduleError, match=message):
        schedule.read_costs(tmp_path / "bad.json")
    with pytest.raises(ScheduleError, match="there is no file"):
        schedule.read_costs(tmp_path / "none.json")
