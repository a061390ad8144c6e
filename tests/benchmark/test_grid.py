"""From choices to contenders: everything that can run, once each, and a reason for the rest. Integers only."""

from __future__ import annotations

from typing import Any

import pytest

from autofunc import schedule
from autofunc.benchmark import Contender, Grid
from autofunc.benchmark.contender import AUTOFUNC, PLAIN, TORCH
from autofunc.benchmark.torch_names import COUNTERPARTS, TORCH_SCHEDULES, stages_of_rank
from autofunc.errors import AutofuncError, ScheduleError


def test_every_combination_once() -> None:
    grid = Grid(("gpipe", "1F1B", "1f1b"), (2, 4), (4, 8), ("graph", "eager"), (False,), (None, "layer"))
    found, left = grid.contenders(processes=1)
    assert len(found) == 2 * 2 * 2 * 2 * 2 and not left
    assert next(iter(found)) == "autofunc gpipe graph pp2 m4"
    assert found["autofunc 1f1b eager pp4 m8 remat=layer"] == Contender(AUTOFUNC, "1f1b", 4, 8, 4, "eager", False, "layer")


def test_sides_take_turns_and_names_are_short() -> None:
    grid = Grid(("gpipe", "1f1b"), against=("torch", "plain"))
    found, left = grid.contenders(processes=2)
    assert list(found) == [
        "autofunc gpipe graph", "torch GPipe eager", "autofunc 1f1b graph", "torch 1F1B eager", "plain loop",
    ]  # fmt: skip
    assert not left and found["plain loop"].side == PLAIN and found["torch 1F1B eager"].stages == 2


@pytest.mark.parametrize(
    ("choices", "processes", "name", "why"),
    [
        ({"schedules": ("dualpipe_v",), "microbatches": (1, 8)}, 2, "autofunc dualpipe_v", "4"),
        ({"engines": ("eager",), "compile": (True, False)}, 2, "autofunc eager, compiled", 'engine="graph"'),
        ({"pp": (2, 4)}, 2, "pp=4", "it needs 4 processes, or one that runs all ranks; there are 2"),
        ({"schedules": ("zb_h1",), "against": ("torch",)}, 2, "torch zb_h1", "does not have this schedule"),
        (
            {"schedules": ("zbv",), "against": ("torch",), "compile": (True, False)},
            2,
            "torch ZBVZeroBubble compiled",
            "separate",
        ),
        ({"schedules": ("zbv",), "against": ("torch",)}, 1, "torch ZBVZeroBubble", "one process is one of torch's ranks"),
        ({"compile": ("graphs", True), "against": ("torch",)}, 2, "torch 1F1B, CUDA graphs", "records no steps"),
        ({"remat": ("stage", None), "against": ("torch",)}, 2, "torch with remat", "no such option"),
    ],
)
def test_contenders_that_cannot_run_are_explained(choices: dict[str, Any], processes: int, name: str, why: str) -> None:
    found, left = Grid(**choices).contenders(processes)
    assert [why in each.why for each in left if each.name == name] == [True], left
    assert "\n" not in "".join(each.why for each in left) and name not in found
    assert any(each.side == AUTOFUNC for each in found.values())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"schedules": ("1f1",)}, "did you mean 1f1b"),
        ({"schedules": ()}, "schedules is empty"),
        ({"pp": (0,)}, "positive numbers"),
        ({"engines": ("grph",)}, "did you mean graph"),
        ({"remat": ("auto",)}, "needs a memory budget"),
        ({"against": ("jax",)}, "known: torch, plain"),
        ({"torch_schedules": ("1f1b",)}, "did you mean 1F1B"),
    ],
)
def test_unknown_choices_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(AutofuncError, match=message):
        Grid(**choices).contenders(2)


def test_one_process_is_one_rank_of_torch() -> None:
    grid = Grid(("1f1b", "interleaved_1f1b"), pp=(2,), against=("torch",))
    found = [each for each in grid.contenders(processes=1)[0].values() if each.side == TORCH]
    assert [(each.schedule, each.stages) for each in found] == [("Interleaved1F1B", 2), ("Interleaved1F1B", 4)]
    names = [name for name in grid.contenders(processes=1)[0] if name.startswith("torch")]
    assert names == ["torch Interleaved1F1B eager s2", "torch Interleaved1F1B eager s4"], "stages tell them apart"


def test_a_custom_schedule(tmp_path: Any) -> None:
    schedule.write_file(schedule.build("1f1b", num_ranks=2, num_microbatches=4), tmp_path / "mine.csv")
    found, left = Grid((str(tmp_path / "mine.csv"),), microbatches=(4, 8), against=("torch",)).contenders(2)
    assert [(each.schedule, each.stages) for each in found.values()] == [(str(tmp_path / "mine.csv"), 2)]
    assert {each.name.split()[0] for each in left} == {AUTOFUNC, TORCH}, "it is for 4 microbatches, and torch has none"


def test_counterparts_have_our_placement() -> None:
    assert set(COUNTERPARTS.values()) == set(TORCH_SCHEDULES)
    for ours, theirs in COUNTERPARTS.items():
        s = schedule.build(ours, num_ranks=2, num_microbatches=8)
        for rank in range(2):
            placed = stages_of_rank(rank, 2, s.num_stages, TORCH_SCHEDULES[theirs].in_v)
            assert placed == list(s.stages_of(rank)), ours
        assert TORCH_SCHEDULES[theirs].per_rank in (0, s.num_stages // 2)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ScheduleError, match="unknown schedule"):
        Grid(("nonsense",), against=("torch",)).contenders(1)
