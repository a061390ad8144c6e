"""`schedule: auto`: the schedule to measure with, the limits of the search, and the same result on all ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autofunc import schedule
from autofunc.config import load_config, parse_config
from autofunc.engine import EngineOptions
from autofunc.errors import ConfigError
from autofunc.schedule.footprint.live import peak_held
from autofunc.train import autoschedule
from autofunc.train.loop import build_pipe
from autofunc.train.memory_budget import check_budget
from autofunc.train.recipe import Recipe, prepare
from tests.cases import pp_mesh
from tests.cli.test_finetune import CONFIG
from tests.pool import WorkerPool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    (tmp_path / "cfg.yaml").write_text(CONFIG.replace("path: corpus", f"path: {tmp_path}/corpus"))
    return tmp_path


def recipe_of(folder: Path, *words: str) -> Recipe:
    return prepare(parse_config(load_config(folder / "cfg.yaml", words)))


def test_the_schedule_to_measure_with(folder: Path) -> None:
    recipe = recipe_of(folder, "distributed.schedule=auto")
    assert recipe.searches and recipe.schedule.name == "1f1b" and recipe.axes.pp == 2
    several = recipe_of(folder, "distributed.schedule=Auto", "distributed.split_points=4")
    assert several.searches and several.schedule.name == "interleaved_1f1b" and several.schedule.num_stages == 4
    default = recipe_of(folder, "distributed.schedule=auto", "distributed.split_points=null", "distributed.pp_size=3")
    assert default.schedule.num_stages == 3


def test_one_rank_has_nothing_to_search_for(folder: Path) -> None:
    words = ("distributed.schedule=auto", "distributed.pp_size=1", "distributed.memory_budget=1kB")
    looped = recipe_of(folder, *words)
    assert not looped.searches and looped.search_budget is None and looped.schedule.name == "interleaved_1f1b"
    assert "pp_size is 1, so schedule auto has nothing to search for and uses interleaved_1f1b" in looped.notes
    assert "pp_size is 1, so memory_budget has no search to limit" in looped.notes
    check_budget(looped)
    plain = recipe_of(folder, *words[:2], "distributed.split_points=null")
    assert not plain.searches and plain.schedule.name == "1f1b"


@pytest.mark.parametrize(
    ("words", "options", "search_budget"),
    [
        ((), EngineOptions(), None),
        (("engine=eager", "remat=stage"), EngineOptions("eager", remat="stage"), None),
        (("compile=true", "remat=layer"), EngineOptions(compile=True, remat="layer"), None),
        (("remat=auto", "memory_budget=2GiB"), EngineOptions(remat="auto", memory_budget=2**31), None),
        (("schedule=auto", "remat=auto", "memory_budget=2000"), EngineOptions(remat="auto", memory_budget=2000), None),
        (("schedule=auto", "remat=layer", "memory_budget=1MB"), EngineOptions(remat="layer"), 10**6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_reach_the_pipeline(
    folder: Path, words: tuple[str, ...], options: EngineOptions, search_budget: int | None
) -> None:
    recipe = recipe_of(folder, *(f"distributed.{word}" for word in words))
    assert recipe.options == options and recipe.search_budget == search_budget
    assert build_pipe(recipe, None).options == options


def test_limits_of_a_search(folder: Path) -> None:
    words = ("distributed.schedule=auto", "distributed.split_points=4")
    recipe = recipe_of(folder, *words)
    limits = autoschedule.search_limits(recipe, None)
    assert limits == {"num_ranks": 2, "num_microbatches": 4, "stages_per_rank": 2, "memory_limit": 4}

    memory = [schedule.StageBytes((8,), (8,), size, size, 0) for size in (10, 20, 30, 40)]
    in_bytes = autoschedule.search_limits(replace(recipe, search_budget=100), memory)
    assert in_bytes["memory_limit"] == 100 and in_bytes["memory"].residuals == [10, 20, 30, 40]
    with pytest.raises(ConfigError, match=r"memory_budget=59 is too small for schedule auto: .* one microbatch alone"):
        autoschedule.search_limits(replace(recipe, search_budget=59), memory)
    as_measured = autoschedule.search_limits(recipe, memory)["memory_limit"]  # of remat auto
    assert as_measured == max(peak_held(recipe.schedule, [10, 20, 30, 40], [10, 20, 30, 40]))


def found_on_gloo(path: str, *words: str) -> tuple[Any, ...]:
    recipe, before = recipe_of(Path(path), "distributed.schedule=auto", *words), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoschedule, "SECONDS", 0.3)
        found = autoschedule.find_schedule(recipe, pp_mesh(2), torch.device("cpu"), None)
    assert torch.equal(before, torch.get_rng_state()), "training draws what it would have drawn"
    kept = found.memory and schedule.Memory.of_stages(found.memory)
    held = max(peak_held(found.schedule, kept.residuals, kept.weight_residuals)) if kept else None
    return schedule.to_text(found.schedule), found.schedule.in_order, found.timeline.peak_activations, held, found.report()


@pytest.mark.parametrize(
    ("words", "most"),
    [
        ((), None),
        (("distributed.engine=eager", "distributed.split_points=4"), None),
        (("distributed.memory_budget=90kB",), 90_000),
        (("distributed.remat=auto", "distributed.memory_budget=60kB"), 60_000),
    ],
    ids=["activations", "eager, two stages a rank", "bytes", "remat auto"],
)
def test_every_rank_gets_the_same(folder: Path, workers: WorkerPool, words: tuple[str, ...], most: int | None) -> None:
    first, second, *other_copy = workers.run(found_on_gloo, str(folder), *words)
    assert first == second and other_copy[0] == other_copy[1]
    text, in_order, activations, held, report = first
    assert in_order and schedule.from_text(text).num_microbatches == 4
    if most is None:
        assert held is None and max(activations) <= schedule.from_text(text).num_stages
        assert "activations at most" in report[1]
    else:
        assert held is not None and held <= most
        assert "bytes at most" in report[1]


def test_the_report_compares(folder: Path) -> None:
    costs = schedule.Costs([1.0, 2.0], [0.0, 1.5], [2.0, 1.0], comm=0.25)
    measured, better = (schedule.build(name, num_ranks=2, num_microbatches=4) for name in ("1f1b", "zb_h1"))
    a, b = (schedule.simulate(each, costs) for each in (measured, better))
    assert autoschedule.Found(b, a, costs, None).report() == [
        "ms of a microbatch by stage: F 1 2, I 0 1.5, W 2 1, transfer 0.25",
        f"schedule auto: zb_h1, {b.makespan:.3g} ms a step predicted, 2 activations at most",
        f"instead of: 1f1b, {a.makespan:.3g} ms a step predicted, 2 activations at most",
    ]
    assert len(autoschedule.Found(a, a, costs, None).report()) == 2, "what was measured with is as good"
