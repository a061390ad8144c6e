"""Schedule files, and files of costs, that are wrong or hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autofunc import schedule
from autofunc.cli.options import Sizes
from autofunc.cli.schedule import build
from tests.cli.here import run_here
from tests.hostile.judge import faults
from tests.hostile.schedules import COSTS, SCHEDULES


def read_schedule(path: Any) -> None:
    build(str(path), Sizes())


def read_costs(path: Any) -> None:
    costs, memory = schedule.read_costs(path)
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    schedule.simulate(s, costs)
    if memory is not None:
        schedule.peak_bytes(s, memory)


def test_schedules(tmp_path: Path) -> None:
    assert len(SCHEDULES) >= 100
    found = faults(SCHEDULES, read_schedule, tmp_path)
    assert not found, "\n".join(found)


def test_costs(tmp_path: Path) -> None:
    found = faults(COSTS, read_costs, tmp_path)
    assert not found, "\n".join(found)


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "bigmb.csv").write_text("0F0,0F999999999,0B0")
    (tmp_path / "costs.json").write_text('{"F": NaN}')
    for words in (["simulate", "bigmb.csv"], ["show", "bigmb.csv"], ["simulate", "1f1b", "--costs", "costs.json"]):
        done = run_here(tmp_path, "schedule", *words)
        assert done.status == 2 and done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1
