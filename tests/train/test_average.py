"""Runs that keep a moving average of their parameters: its values, its files, and how it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import autofunc as af
from autofunc.tree import flatten
from tests.cli.here import run_here
from tests.train.test_weighing import PARTS, finetune

SECTIONS: dict[str, Any] = {
    "ema": {"decay": 0.75, "every_steps": 2, "validation": True},
    "checkpoint": {"save_consolidated": "every"},
    "dataset": {"_target_": "parts.py:rows", "count": 32},
    "step_scheduler": {"global_batch_size": 8, "local_batch_size": 4, "num_epochs": 2, "ckpt_every_steps": 1},
}
WORDS = "finetune", "llm", "-c", "run.yaml", "--checkpoint.restore_from"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps; every second one moves the average."""
    folder = tmp_path_factory.mktemp("average")
    finetune(folder, **SECTIONS)
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))


def scope() -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(PARTS, found)
    return found


def validation_losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def test_it_averages_the_steps(run: Path) -> None:
    average = flatten(scope()["build"]().state_dict())
    for step in range(1, 9):
        params = load_file(run / "out" / "checkpoints" / f"step_{step}" / "model.safetensors")
        if step % 2 == 0:
            average = flatten(af.ema(average, params, 0.75))
    found, last = (load_file(run / "out" / name) for name in ("model_ema.safetensors", "model.safetensors"))
    assert set(found) == set(last)
    assert all(torch.equal(found[path], leaf) for path, leaf in average.items())
    assert not any(torch.equal(found[path], leaf) for path, leaf in last.items())


def test_it_is_validated(run: Path) -> None:
    made = scope()
    model = made["build"]()
    model.load_state_dict(load_file(run / "out" / "model_ema.safetensors"))
    rows = made["rows"](11)
    outputs = model(torch.stack([row["input"] for row in rows]))
    loss = made["cross_entropy"](outputs, {"labels": torch.stack([row["labels"] for row in rows])}).item()
    assert validation_losses(run / "out")[8] == pytest.approx(loss, rel=1e-6)
    words = "evaluate", "-c", "run.yaml", "--checkpoint.restore_from", "LATEST", "--json"
    done = run_here(run, *words)
    assert json.loads(done.out)["validation_loss"] == pytest.approx(loss, rel=1e-6)
    assert "note: ema.validation: using the moving average of the weights" in done.err
    of_last = run_here(run, *words, "--ema.validation", "false")
    assert json.loads(of_last.out)["validation_loss"] != pytest.approx(loss, rel=1e-6) and not of_last.err
    by_name = run_here(run, *words[:3], "--weights", "out/model_ema.safetensors")
    assert "weights: out/model_ema.safetensors" in by_name.out and f"validation loss: {loss:.4f}" in by_name.out


def test_a_resumed_run_continues_it(folder: Path) -> None:
    done = run_here(folder, *WORDS, "out/checkpoints/step_3", "--output_dir", "more")
    assert done.status == 0, done.err
    for name in ("model.safetensors", "model_ema.safetensors"):
        assert (folder / "more" / name).read_bytes() == (folder / "out" / name).read_bytes()
    assert validation_losses(folder / "more")[8] == validation_losses(folder / "out")[8]
    assert "model.safetensors, model_ema.safetensors" in " ".join(done.out.split())


def test_a_checkpoint_without_an_average(folder: Path) -> None:
    begin = "--ema", "null", "--output_dir", "none", "--step_scheduler.max_steps", "2"
    assert run_here(folder, *WORDS[:4], *begin).status == 0
    assert not (folder / "none" / "model_ema.safetensors").exists()
    at = "-c", "run.yaml", "--checkpoint.restore_from", "none/checkpoints/step_2"
    assert "none/checkpoints/step_2 has no moving average; using its" in run_here(folder, "evaluate", *at).err
    done = run_here(folder, *WORDS, "none/checkpoints/step_2", "--output_dir", "more", "--step_scheduler.max_steps", "4")
    assert done.status == 0, done.err
    assert "ema: none/checkpoints/step_2 has no average; starting one from the parameters of step 2" in " ".join(
        done.out.split()
    )
    first, last = (
        load_file(folder / "more" / name)
        for name in ("checkpoints/step_4/model.safetensors", "model_ema.safetensors")
    )  # fmt: skip
    begun = load_file(folder / "none" / "model.safetensors")
    expected = flatten(af.ema(begun, first, 0.75))
    assert all(torch.equal(last[path], leaf) for path, leaf in expected.items())
