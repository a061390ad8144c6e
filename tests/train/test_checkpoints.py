"""Runs that end and resume: the same bits, the right folder, and one line for each mistake."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from autofunc.train.step_folders import steps_in
from tests.cli.here import Done, run_here
from tests.cli.test_finetune import CONFIG, computed, start

STEPS = 11
ROWS = """
import os
import signal
from autofunc.data import TextFolder

class Rows(TextFolder):
    # a process, of several the second, is told to end while it reads a row for the nth time
    reads = 0

    def __getitem__(self, index):
        Rows.reads += 1
        if str(Rows.reads) == os.environ.get("END_AT") and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)
"""
SMALL = (
    CONFIG.replace("pp_size: 2, split_points: [h.1]", "engine: eager").replace("max_steps: 6", f"max_steps: {STEPS}")
    .replace("dataset: {_target_: autofunc.data.TextFolder", "dataset: {_target_: rows.py:Rows", 1)
    .replace("num_epochs: 1", "")
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, with a checkpoint after every fourth step and at the end of each epoch."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    (folder / "rows.py").write_text(ROWS)
    (folder / "cfg.yaml").write_text(SMALL + "checkpoint: {}\n")
    done = run_here(folder, "finetune", "llm", "-c", "cfg.yaml", "--step_scheduler.ckpt_every_steps", "4")
    assert done.status == 0, done.err
    assert steps_in(folder / "runs" / "cfg" / "checkpoints") == [4, 8, 11]
    return folder


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Path:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path


def again(folder: Path, *words: str) -> Done:
    return run_here(folder, "finetune", "llm", "-c", "cfg.yaml", *words)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [computed(line) for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Compare losses, norms and weights bit for bit; one run may have been validated more often."""
    found = {(line["step"], *sorted(line)): line for line in metrics(other)}
    for line in metrics(one):
        assert found[(line["step"], *sorted(line))] == line
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [(), ("--checkpoint.is_async", "true", "--checkpoint.save_consolidated", "every")])
def test_a_run_that_was_told_to_end_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    monkeypatch.setenv("END_AT", "60")
    ended = again(folder, *more)
    assert ended.status == 0, ended.err
    found = re.search(r"told to end by SIGTERM, after step (\d+) of 11. To resume:\n  autofunc (.*)\n", ended.out)
    assert found and 4 < int(found[1]) < 8 and "validation loss" not in ended.out.partition("told to end")[2]
    assert steps_in(folder / "runs" / "cfg-2" / "checkpoints") == [4, int(found[1])]
    assert not (folder / "runs" / "cfg-2" / "model.safetensors").exists()

    monkeypatch.delenv("END_AT")
    done = run_here(folder, *shlex.split(found[2]))
    assert done.status == 0, done.err
    assert f"resuming from runs/cfg-2/checkpoints/step_{found[1]}, after step {found[1]}" in done.out
    assert_same_run(folder / "runs" / "cfg", folder / "runs" / "cfg-2")
    whole = folder / "runs" / "cfg-2" / "checkpoints" / "step_8" / "model.safetensors"
    assert whole.exists() == bool(more)


@pytest.mark.full
@pytest.mark.parametrize("sizes", [{"pp_size": 2, "split_points": "[h.1]"}, {"dp_size": 2}], ids=["pp", "dp"])
def test_all_processes_end_after_the_same_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, object]
) -> None:  # fmt: skip
    layout = [word for name, value in sizes.items() for word in (f"--distributed.{name}", str(value))]
    command = ("finetune", "llm", "-c", "cfg.yaml", *layout, "--output_dir")
    assert start(folder, *command, "whole").returncode == 0
    monkeypatch.setenv("END_AT", "30")
    ended = start(folder, *command, "ended")
    found = re.search(r"told to end by SIGTERM, after step (\d+) of 11. To resume:\n  autofunc (.*)\n", ended.stdout)
    assert ended.returncode == 0 and found, ended.stderr
    assert steps_in(folder / "ended" / "checkpoints")[-1] == int(found[1]) < STEPS
    monkeypatch.delenv("END_AT")
    done = start(folder, *shlex.split(found[2]))
    assert done.returncode == 0, done.stderr
    assert metrics(folder / "ended") == metrics(folder / "whole")


def test_a_run_resumes_from_any_checkpoint(folder: Path) -> None:
    """Resume for longer than planned, from the latest checkpoint in its folder; and from an older one in a new folder."""
    first = folder / "runs" / "cfg"
    shutil.copytree(first, folder / "before", symlinks=True)
    assert again(folder, "--step_scheduler.max_steps", "13", "--checkpoint.restore_from", "LATEST").status == 0
    assert metrics(first)[-2]["step"] == 13 and steps_in(first / "checkpoints") == [4, 8, 11, 12, 13]
    older = "--checkpoint.restore_from", "before/checkpoints/step_4", "--output_dir"
    assert again(folder, *older, "other").status == 0
    assert metrics(folder / "other") == metrics(folder / "before")[5:]
    assert "is not the latest in its folder, and the run would overwrite step_8" in again(folder, *older, "before").err
    assert again(folder, "--checkpoint.restore_from", "LOWEST_VAL", "--output_dir", "before").status == 0


def test_old_checkpoints_go_and_the_best_stays(folder: Path) -> None:
    def validated(step: int, loss: float) -> None:
        file = checkpoints / f"step_{step}" / "autofunc.json"
        file.write_text(re.sub(r'"validation_loss": [^\n]*', f'"validation_loss": {loss}', file.read_text()))

    checkpoints = folder / "runs" / "cfg" / "checkpoints"
    validated(8, 0.001)
    words = "--checkpoint.max_recent_checkpoints", "2", "--step_scheduler.max_steps", "15", "--checkpoint.restore_from"
    assert again(folder, *words, "AUTO").status == 0
    assert steps_in(checkpoints) == [8, 12, 15], "the epoch ends with the twelfth"
    assert (checkpoints / "LATEST").resolve().name == "step_15"
    assert (checkpoints / "LOWEST_VAL").resolve().name == "step_8"
    said = again(folder, *words, "LOWEST_VAL").err
    assert "step_8' is not the latest" in said


def test_folders_are_overwritten_on_request_only(folder: Path) -> None:
    here = "--output_dir", "runs/cfg"
    said = again(folder, *here).err
    assert "already holds a run" in said and "--checkpoint.restore_from LATEST to resume it" in said
    said = again(folder, "--checkpoint.checkpoint_dir", "runs/cfg/checkpoints", "--output_dir", "new").err
    assert "runs/cfg/checkpoints already holds a run" in said
    (folder / "runs" / "cfg" / "checkpoints" / "step_99.partial").mkdir()
    assert again(folder, *here, "--overwrite", "--step_scheduler.max_steps", "1").status == 0
    assert [entry.name for entry in sorted((folder / "runs" / "cfg" / "checkpoints").iterdir())] == [
        "LATEST", "LOWEST_VAL", "step_1",
    ]  # fmt: skip


def test_auto_starts_fresh_without_a_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "runs" / "cfg" / "checkpoints")
    words = "--checkpoint.restore_from", "AUTO", "--output_dir", "runs/cfg", "--step_scheduler.max_steps", "1"
    assert again(folder, *words).status == 0
    assert [line["step"] for line in metrics(folder / "runs" / "cfg")] == [1, 1]


WRONG = {
    ("--checkpoint.restore_from", "LATEST", "--output_dir", "new"): ["LATEST of 'new/checkpoints': it has no checkpoint"],
    ("--checkpoint.restore_from", "LOWEST_VAL", "--output_dir", "new"): ["LOWEST_VAL of 'new/checkpoints'"],
    ("--checkpoint.restore_from", "nowhere"): ["nowhere is not a folder"],
    ("--checkpoint.restore_from", "corpus"): ["corpus is not a complete checkpoint: it has no autofunc.json"],
    ("--checkpoint.restore_from", "LATEST", "--seed", "1"): ["seed 42 there, 1 here"],
    ("--checkpoint.restore_from", "LATEST", "--dataset.seq_len", "8"): ["with other data: the rows of dataset"],
    ("--checkpoint.restore_from", "LATEST", "--step_scheduler.max_steps", "9"): ["is from step 11", "ends after 9"],
    ("--checkpoint.restore_from", "LATEST", "--model.n_layer", "3"): ["of a different model", "it lacks parameters h.2."],
    ("--checkpoint.restore_from", "LATEST", "--model.n_positions", "32"): [
        "wpe.weight has shape (16, 16) there, and (32, 16)"
    ],
    ("--checkpoint.max_recent_checkpoints", "0"): ["checkpoint.max_recent_checkpoints", "got 0"],
    ("--checkpoint.save_consolidated", "some"): ["checkpoint.save_consolidated", "'final' or 'every'"],
}


def test_checkpoints_that_cannot_be_resumed(folder: Path) -> None:
    for words, expected in WRONG.items():
        done = again(folder, *words)
        assert done.status == 2 and done.err.startswith("error: "), (words, done)
        flat = " ".join(done.err.split())
        assert all(each in flat for each in expected), (words, done.err)
    done = again(folder, "--checkpoint.restore_from", "LATEST", "--optimizer._target_", "torch.optim.SGD")
    assert done.status != 0 and "of a different optimizer than" in done.err


def test_a_full_disk_does_not_end_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    done = again(folder, "--step_scheduler.max_steps", "5")
    assert done.status == 0 and "no checkpoint: runs/cfg-2/checkpoints/step_4 cannot be written: OSError" in done.out
    assert (folder / "runs" / "cfg-2" / "model.safetensors").exists()
    assert not list((folder / "runs" / "cfg-2" / "checkpoints").iterdir()), "nothing is left of them"
