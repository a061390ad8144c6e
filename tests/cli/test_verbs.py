"""`finetune llm`, `pretrain llm` and `train` are one command."""

from __future__ import annotations

from pathlib import Path

from tests.cli.here import run_here
from tests.cli.test_finetune import CONFIG


def test_all_verbs_train_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    text = CONFIG.replace("pp_size: 2, split_points: [h.1]", "engine: eager")
    (tmp_path / "cfg.yaml").write_text(text.replace("max_steps: 6", "max_steps: 1"))
    weights = set()
    for verb in (("finetune", "llm"), ("pretrain", "llm"), ("train",)):
        done = run_here(tmp_path, *verb, "-c", "cfg.yaml", "--output_dir", verb[0])
        assert done.status == 0, done.err
        weights.add((tmp_path / verb[0] / "model.safetensors").read_bytes())
    assert len(weights) == 1


def test_other_domains(tmp_path: Path) -> None:
    for verb in ("finetune", "pretrain"):
        done = run_here(tmp_path, verb, "vision", "-c", "cfg.yaml")
        assert done.status == 2 and f"{verb} 'vision'" in done.err and "autofunc train" in done.err


def test_restarts_need_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox " * 12)
    (tmp_path / "cfg.yaml").write_text(CONFIG.replace("pp_size: 2, split_points: [h.1]", "engine: eager"))
    done = run_here(tmp_path, "train", "-c", "cfg.yaml", "--max-restarts", "2")
    assert done.status == 2 and "--max-restarts 2" in done.err and "checkpoint: {}" in done.err
