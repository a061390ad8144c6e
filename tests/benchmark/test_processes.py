"""Benchmarks on several processes: pipelines of other sizes share them, and the command starts them itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import autofunc as af
from autofunc.benchmark.contender import AUTOFUNC, PLAIN, TORCH
from tests.cases import make_case
from tests.cli.here import run_here
from tests.cli.test_finetune import CONFIG
from tests.pool import WorkerPool

ROOT = Path(__file__).parent.parent.parent


def of_three_sizes() -> dict[str, Any]:
    """Run in a worker: pipelines of 1, 2 and 4 of four processes, with tied weights and dropout."""
    model, _, loss, batch = make_case("gpt2", 4, 8)
    found = af.bench(
        model, batch, loss=loss, schedules=["1f1b"], pp=[1, 2, 4], microbatches=[8], against=["torch", "plain"],
        key=(0, 1), repetitions=2, steps=2, progress=False,
    )  # fmt: skip
    return found.to_dict()


@pytest.mark.full
def test_pipelines_of_several_sizes_share_processes(workers: WorkerPool) -> None:
    workers.seconds_for_one_call = 300.0
    first, *others = workers.run(of_three_sizes)
    assert all(each == first for each in others) and not first["left_out"]
    by_side = {
        side: [each for each in first["contenders"] if each["side"] == side] for side in (AUTOFUNC, TORCH, PLAIN)
    }  # fmt: skip
    assert [len(each) for each in by_side.values()] == [3, 3, 1]
    for each in first["contenders"]:
        assert each["gradient_error"] <= (1e-5 if each["side"] == TORCH else 0.0), each
        assert len(each["step_ms"]) == 2 and len(each["peak_bytes"]) == each["pp"] and min(each["peak_bytes"]) > 0
        if each["side"] == AUTOFUNC and each["pp"] > 1:
            assert each["live_bytes"] == each["predicted_bytes"] and len(each["live_bytes"]) == each["pp"]
        if each["side"] != PLAIN and each["pp"] > 1:
            assert 0 < each["bubble"] < 1 and 0 <= each["schedule_bubble"] < 1
        else:
            assert each["bubble"] is None


def folder_with_data(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "cfg.yaml").write_text(CONFIG)
    return tmp_path


def test_the_command_in_one_process(tmp_path: Path) -> None:
    folder = folder_with_data(tmp_path)
    words = ("--nproc-per-node", "1", "--schedules", "1f1b", "--repetitions", "1", "--seconds", "60")
    done = run_here(folder, "bench", "-c", "cfg.yaml", *words, "--model.n_embd", "8")
    assert done.status == 0, done.err
    assert "1 contender on 1 process" in done.out and "autofunc 1f1b graph" in done.out and "\x1b" not in done.out
    said = json.loads((folder / "runs" / "bench_cfg" / "bench.json").read_text())
    assert said["contenders"][0]["microbatches"] == 4 and said["setting"]["tokens"] == 8 * 16
    assert all((folder / "runs" / "bench_cfg" / name).stat().st_size for name in ("bench.png", "bench.html"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schedules", "1f1"), "did you mean 1f1b"),
        (("--schedules", "1f1b,,gpipe"), "expected values separated by commas"),
        (("--compile", "yes"), "--compile yes"),
        (("--pp", "two"), "--pp two: expected positive numbers"),
        (("--microbatches", "3", "--nproc-per-node", "1"), "cannot be cut into 3"),
        (("--distributed.tp_size", "2"), "bench measures pp only, but distributed.tp_size is 2"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = run_here(folder_with_data(tmp_path), "bench", "-c", "cfg.yaml", *words)
    assert done.status == 2 and message in " ".join(done.err.split()), done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_the_command_on_two_processes(tmp_path: Path, launcher: str) -> None:
    folder = folder_with_data(tmp_path)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if launcher == "torchrun" else []
    words = ["bench", "-c", "cfg.yaml", "--schedules", "1f1b,zbv", "--against", "torch", "--repetitions", "2", "-o", "out"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "autofunc", *words],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads((folder / "out" / "bench.json").read_text())
    assert [each["name"] for each in said["contenders"]] == [
        "autofunc 1f1b graph", "torch 1F1B eager", "autofunc zbv graph", "torch ZBVZeroBubble eager",
    ]  # fmt: skip
    assert said["setting"]["processes"] == 2 and done.stdout.count("memory of a step") == 1
    assert "best against best" in done.stdout and "\x1b" not in done.stdout
