"""Output folders: no run replaces another unasked, and losing a folder does not lose weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autofunc.errors import ConfigError, PipelineRunError
from autofunc.train import lead, weights
from autofunc.train.metrics_file import MetricsFile
from autofunc.train.output import default_output_dir, make_output_dir
from autofunc.tree import to_tensordict
from tests.cli.here import run_here
from tests.train.test_weighing import finetune


def test_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    make_output_dir(folder, overwrite=False)
    (folder / "notes.txt").write_text("mine")
    make_output_dir(folder, overwrite=False)
    for name in ("metrics.jsonl", "model.safetensors"):
        (folder / name).write_text("old")
    with pytest.raises(ConfigError, match=r"already holds a run \(metrics.jsonl, model.safetensors\); .* --overwrite"):
        make_output_dir(folder, overwrite=False)
    make_output_dir(folder, overwrite=True)
    assert [each.name for each in folder.iterdir()] == ["notes.txt"], "the rest of an old run stays beside no new one"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(ConfigError, match="cannot write to"):
            make_output_dir(folder, overwrite=False)
    (tmp_path / "out" / "loss.png").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"already holds a run \(loss.png\)"):
        make_output_dir(tmp_path / "out", overwrite=False)
    with pytest.raises(ConfigError, match="cannot write to"):
        make_output_dir(tmp_path / "out", overwrite=True)


def test_a_taken_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert default_output_dir("examples/demo.yaml") == Path("runs/demo-2")


def test_a_second_run(tmp_path: Path) -> None:
    finetune(tmp_path)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    again = ("finetune", "llm", "-c", "run.yaml", "--seed", "7", "--step_scheduler.max_steps", "1")
    done = run_here(tmp_path, *again)
    assert done.status == 2 and "--overwrite" in done.err and "Traceback" not in done.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert run_here(tmp_path, *again, "--overwrite").status == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_a_lost_folder_does_not_lose_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune(tmp_path)
    train, out = lead.train, tmp_path / "out"

    def removed() -> None:
        shutil.rmtree(out)

    def blocked() -> None:
        (out / "loss.png").mkdir()

    for disturb, left in (
        (removed, "run.html, model.safetensors"),
        (blocked, "metrics.jsonl, run.html, model.safetensors, logs/"),
    ):

        def disturbed(*given: Any, disturb: Callable[[], None] = disturb) -> Any:
            result = train(*given)
            disturb()
            return result

        monkeypatch.setattr(lead, "train", disturbed)
        done = run_here(tmp_path, "finetune", "llm", "-c", "run.yaml", "--overwrite")
        assert done.status == 0 and "loss.png could not be drawn" in done.out and f"written to out: {left}\n" in done.out
        assert load_file(out / "model.safetensors")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsFile(Path("/dev/full"))
    for step in range(3):
        metrics.write(step=step)
    metrics.close()
    assert metrics.error is not None and "No space left" in str(metrics.error)
    params = to_tensordict({"weight": torch.ones(2)})
    monkeypatch.setattr(weights.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineRunError, match="They are in"):
        weights.save_safely(lambda path: weights.save_weights(params, path), tmp_path / "file" / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["weight"].tolist() == [1, 1]
