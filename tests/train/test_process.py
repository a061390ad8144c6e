"""A run restores the settings of its process, and tries and reads nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autofunc.config import load_config, parse_config
from autofunc.train import recipe, trial
from autofunc.train.recipe import Recipe, prepare
from autofunc.train.threads import threads
from tests.cli.test_finetune import CONFIG

COUNTED = """
from pathlib import Path
from autofunc.data import TextFolder

def dataset(**options):
    with Path("read").open("a") as file:
        file.write(options.get("split", "train") + " ")
    return TextFolder(**options)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    (tmp_path / "counted.py").write_text(COUNTED)
    (tmp_path / "cfg.yaml").write_text(CONFIG.replace("autofunc.data.TextFolder", "counted.py:dataset"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counted_recipe(monkeypatch: pytest.MonkeyPatch, checked: bool, *words: str) -> tuple[Recipe, int, int]:
    """Return a recipe, and how often stages and the optimizer were tried."""
    tries: list[Any] = []
    optimizers: list[Any] = []
    infer, attempt = trial.infer_boundaries, recipe.try_optimizer
    monkeypatch.setattr(trial, "infer_boundaries", lambda *given, **named: (tries.append(1), infer(*given, **named))[1])
    monkeypatch.setattr(recipe, "try_optimizer", lambda *given: (optimizers.append(1), attempt(*given))[1])
    made = prepare(parse_config(load_config("cfg.yaml", words)), checked=checked)
    monkeypatch.undo()
    return made, len(tries), len(optimizers)


def test_each_dataset_is_read_once_and_each_signature_tried_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tries, optimizers = counted_recipe(monkeypatch, False)
    assert (folder / "read").read_text() == "train validation "
    assert len(made.dataset) % made.rows and made.validation_datasets, "there are short last batches too"
    assert (tries, optimizers) == (2, 1), "a whole microbatch, and the rows that are left"


def test_other_lengths_are_tried_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tries, _ = counted_recipe(monkeypatch, False, "--validation_dataset.seq_len", "8")
    assert tries == 3, "and one of the two numbers of rows"


def test_workers_do_not_try_the_recipe_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, _, _ = counted_recipe(monkeypatch, False)
    monkeypatch.chdir(folder)
    made, tries, optimizers = counted_recipe(monkeypatch, True)
    assert (tries, optimizers) == (0, 0)
    assert (folder / "read").read_text() == "train validation " * 2, "once in each"
    assert [stage.layers for stage in made.stages] == [stage.layers for stage in parents.stages]
    for name in ("axes", "schedule", "searches", "options", "loss", "num_steps", "rows", "notes"):
        assert getattr(made, name) == getattr(parents, name), name


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
