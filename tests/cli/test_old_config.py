"""A configuration written for NeMo AutoModel, unchanged, with the hub's dataset in the local cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from autofunc.config import read_config
from autofunc.config.nemo_names import RENAMED, with_new_names
from tests.cli.here import run_here

CONFIG = """
# my_gpt2_config.yaml
model:
  _target_: nemo_automodel.components.models.gpt2.build_gpt2_model
  n_layer: 12
  n_embd: 768
  n_head: 12
  vocab_size: 50257

dataset:
  _target_: nemo_automodel.components.datasets.llm.hellaswag.HellaSwag
  path_or_dataset: rowan/hellaswag
  split: train

step_scheduler:
  global_batch_size: 64
  local_batch_size: 8
  num_epochs: 1

distributed:
  strategy: fsdp2
  tp_size: 1

optimizer:
  _target_: torch.optim.Adam
  lr: 1e-4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the configuration, and a cache as after a download."""
    path = tmp_path_factory.mktemp("old")
    rows = [{"ctx": f"Cat {n}", "endings": ["sat.", "ran.", "is.", "was."], "label": str(n % 4)} for n in range(130)]
    (path / "hellaswag").mkdir()
    (path / "hellaswag" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "my_gpt2_config.yaml").write_text(CONFIG)
    cache = path / "cache"
    datasets.load_dataset(str(path / "hellaswag"), split="train", cache_dir=str(cache))
    (cache / "hellaswag").rename(cache / "rowan___hellaswag")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield path


def autofunc(folder: Path, *words: str) -> str:
    done = run_here(folder, *words)
    assert done.status == 0, done.out + done.err
    return done.out


SMALL = ["--model.n_layer", "2", "--model.n_embd", "48", "--model.vocab_size", "256"]


def test_plan_reports_renamed_targets(folder: Path) -> None:
    shown = autofunc(folder, "plan", "-c", "my_gpt2_config.yaml", "--distributed.pp_size", "2")
    words = " ".join(shown.split())
    assert "model._target_: nemo_automodel.components.models.gpt2.build_gpt2_model is stages.gpt2.build_gpt2_model" in words
    assert (
        "dataset._target_: nemo_automodel.components.datasets.llm.hellaswag.HellaSwag is autofunc.data.HellaSwag" in words
    )
    assert "8 microbatches" in words and "split_points: [h.9]" in words  # the head of 50,257 words weighs three blocks


def test_check(folder: Path) -> None:
    shown = autofunc(folder, "check", "-c", "my_gpt2_config.yaml", *SMALL)
    assert "0 failed" in shown and "is stages.gpt2.build_gpt2_model here" in " ".join(shown.split())


def test_two_steps_of_a_smaller_one(folder: Path) -> None:
    shown = autofunc(folder, "finetune", "llm", "-c", "my_gpt2_config.yaml", "--step_scheduler.max_steps", "2", *SMALL)
    assert "2 steps in" in shown
    lines = (folder / "runs" / "my_gpt2_config" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in metrics] == [1, 2] and all(4 < entry["loss"] < 7 for entry in metrics)


@pytest.mark.full
def test_two_steps_as_printed(folder: Path) -> None:
    shown = autofunc(folder, "finetune", "llm", "-c", "my_gpt2_config.yaml", "--step_scheduler.max_steps", "2")
    assert "2 steps in" in shown


def test_unknown_names() -> None:
    raw = {"model": {"_target_": "nemo_automodel.components.models.gpt3.build_gpt3_model"}}
    _, _, (problem,) = with_new_names(raw)
    assert re.match(r"model._target_: .* has no equivalent here; did you mean build_gpt2_model", problem)
    same = {"model": {"_target_": "torch.nn.Linear", "nested": {"_target_": "nemo_automodel.x.HellaSwag"}}, "seed": 3}
    renamed, notes, problems = with_new_names(same)
    assert (
        renamed["model"]["nested"]["_target_"] == RENAMED["HellaSwag"]
        and renamed["seed"] == 3
        and len(notes) == 1
        and not problems
    )


def test_it_validates(folder: Path) -> None:
    config, notes = read_config(folder / "my_gpt2_config.yaml")
    assert config.model["_target_"] == "stages.gpt2.build_gpt2_model" and len(notes) == 2
