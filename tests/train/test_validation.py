"""Metrics, early stopping, and evaluation alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import autofunc as af
from autofunc.batch import COUNTS
from autofunc.checkpoint import read_extra
from autofunc.config.validations import display_name, leading
from autofunc.counted_rows import measured
from autofunc.errors import BatchError, ConfigError
from autofunc.metrics import accuracy
from autofunc.train.curves import _losses
from autofunc.train.early_stopping import EarlyStopping, Patience
from tests.cli.here import run_here
from tests.cli.test_finetune import CONFIG

OWN = """
def right(outputs, microbatch):
    return (outputs.argmax(-1) == microbatch["labels"]).float().mean()

def words(outputs, microbatch):
    return outputs[:, 0, :3]
"""
ACCURACY = "--metrics.accuracy._target_", "autofunc.metrics.accuracy"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    (folder / "own.py").write_text(OWN)
    text = CONFIG.replace("pp_size: 2, split_points: [h.1]", "engine: eager").replace("max_steps: 6", "max_steps: 3")
    (folder / "cfg.yaml").write_text(text + "checkpoint: {}\n")
    done = run_here(folder, "train", "-c", "cfg.yaml", *ACCURACY, "--step_scheduler.val_every_steps", "2")
    assert done.status == 0, done.err
    return folder


def lines_of(folder: Path, run: str = "cfg") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_measures_validation(trained: Path) -> None:
    found = [line for line in lines_of(trained) if "validation_loss" in line]
    assert [line["step"] for line in found] == [2, 3]
    assert all(0 <= line["validation_accuracy"] <= 1 for line in found)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_an_evaluation_equals_the_runs_validation(trained: Path, engine: str) -> None:
    """Also in another layout, with a mean if rows are left over."""
    words = "--checkpoint.restore_from", "LATEST", "--json", *ACCURACY, "--metrics.mean._target_", "own.py:right"
    more = "--distributed.engine", engine, "--step_scheduler.local_batch_size", "1"
    done = run_here(trained, "evaluate", "-c", "cfg.yaml", *words, *more)
    assert done.status == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    expected = lines_of(trained)[-1]
    assert found["step"] == 3 and found["checkpoint"].endswith("step_3")
    assert found["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-6)
    assert found["validation_accuracy"] == found["validation_mean"] == expected["validation_accuracy"]
    assert not (trained / "runs" / "cfg-2").exists(), "nothing is written"


def test_weights_of_a_run(trained: Path) -> None:
    done = run_here(trained, "evaluate", "-c", "cfg.yaml", "--weights", "runs/cfg", "--json")
    found = json.loads(done.out.splitlines()[-1])
    assert found["validation_loss"] == pytest.approx(lines_of(trained)[-1]["validation_loss"], abs=1e-6)


WRONG = {
    ("--metrics.m._target_", "own.py:words"): ["the metric 'm' must return a scalar mean", "a tensor of shape (2, 3)"],
    ("--metrics.m._target_", "own.py:none"): ["metrics.m", "has no 'none'", "right"],
    ("--metrics.m._target_", "autofunc.metrics.accuracy", "--metrics.m.label", "x"): [
        "metrics.m.label",
        "did you mean labels",
    ],
    ("--metrics.m._target_", "autofunc.metrics.accuracy", "--metrics.m.labels", "x"): ["the batch has no 'x'"],
    (*ACCURACY, "--validation_dataset", "null"): ["metrics is measured on validation_dataset"],
    ("--early_stopping.patience", "0"): ["early_stopping.patience", "got 0"],
    ("--early_stopping.patience", "2", "--validation_dataset", "null"): ["early_stopping is measured on"],
}


def test_an_older_checkpoint_is_measured(trained: Path) -> None:
    """Nothing is written, and only the measured data is read."""
    folder = trained / "runs" / "cfg" / "checkpoints"
    (folder / "step_9").mkdir()  # a newer one
    older = ["-c", "cfg.yaml", "--output_dir", "runs/cfg", "--checkpoint.restore_from", str(folder / "step_3")]
    try:
        done = run_here(trained, "evaluate", *older, "--dataset.path", "nowhere", "--json")
        assert done.status == 0, done.err
        assert json.loads(done.out)["validation_loss"] == lines_of(trained)[-1]["validation_loss"]
        done = run_here(trained, "train", *older)
        assert done.status == 2 and "the run would overwrite step_9" in done.err
    finally:
        (folder / "step_9").rmdir()
    done = run_here(trained, "evaluate", *older, "--validation_dataset.seq_len", "17")
    assert done.status == 2 and "the model on a batch of validation_dataset: " in done.err
    done = run_here(trained, "evaluate", *older, "--model.n_embd", "8")
    assert done.status == 2 and "checkpoint.restore_from" in done.err and "(8,) here" in done.err


NAMED = """
validation_dataset_b: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 8, num_samples_limit: 5}
validation_dataset_a: {_target_: autofunc.data.TextFolder, path: corpus, seq_len: 16, num_samples_limit: 7}
validation_dataloader: {batch_size: 3}
"""


def test_datasets_by_name(trained: Path) -> None:
    """Each dataset is measured as if alone, with any number of rows per microbatch; the chosen one leads."""
    (trained / "named.yaml").write_text((trained / "cfg.yaml").read_text() + NAMED)
    done = run_here(trained, "train", "-c", "named.yaml", *ACCURACY, "--checkpoint.best_metric_key", "a")
    assert done.status == 0, done.err
    line = lines_of(trained, "named")[-1]
    names = [f"validation_{name}{what}" for name in ("", "b_", "a_") for what in ("loss", "accuracy")]
    assert [*line] == ["step", *names]
    assert f"validation b loss: {line['validation_b_loss']:.4f}" in done.out
    last = trained / "runs" / "named" / "checkpoints" / "step_3"
    assert read_extra(last)["validation_loss"] == line["validation_a_loss"] != line["validation_loss"]
    given = yaml.safe_load((trained / "named.yaml").read_text())
    for name in ("b", "a"):
        section = json.dumps(given[f"validation_dataset_{name}"] | {"split": "train"})
        alone = ["-c", "cfg.yaml", "--weights", "runs/named", "--json", "--validation_dataset", section, *ACCURACY]
        found = json.loads(run_here(trained, "evaluate", *alone).out)
        assert found["validation_loss"] == pytest.approx(line[f"validation_{name}_loss"], abs=1e-6)
        assert found["validation_accuracy"] == pytest.approx(line[f"validation_{name}_accuracy"], abs=1e-6)


WRONG_NAMES = {
    ("--validation_dataset_", "{_target_: x.y}"): ["unknown key 'validation_dataset_'", "validation_dataset"],
    ("--validation_datset_a", "{_target_: x.y}"): ["unknown key 'validation_datset_a': did you mean validation_dataset"],
    ("--validation_dataset_c", "{path: x}"): ["validation_dataset_c", "needs a _target_"],
    ("--validation_dataset_a.seq_length", "3"): ["validation_dataset_a.seq_length", "did you mean seq_len"],
    ("--validation_dataset_a.path", "nowhere"): ["validation_dataset_a: TextFolder: nowhere is neither"],
    ("--validation_dataset_a.seq_len", "17"): ["the model on a batch of validation_dataset_a", "17 tokens"],
    ("--checkpoint.best_metric_key", "c"): ["checkpoint.best_metric_key", "'c'", "known: default, b, a"],
    ("--metrics.a_loss._target_", "autofunc.metrics.accuracy"): ["validation_a_loss would be measured on"],
    ("--validation_dataloader.batch_size", "0"): ["validation_dataloader.batch_size", "got 0"],
    ("--validation_dataloader.collate_fn", "x"): ["unknown key 'validation_dataloader.collate_fn', of NeMo AutoModel"],
}


def test_wrong_names(trained: Path) -> None:
    (trained / "wrong.yaml").write_text((trained / "cfg.yaml").read_text() + NAMED)
    for words, expected in WRONG_NAMES.items():
        done = run_here(trained, "train", "-c", "wrong.yaml", *words)
        assert done.status == 2, (words, done)
        assert all(each in done.err for each in expected), (words, done.err)


def test_the_leading_dataset() -> None:
    both, named = ["validation_dataset", "validation_dataset_a"], ["validation_dataset_b", "validation_dataset_a"]
    cases = [(both, None), (both, "a"), (named, None), (named, "a"), (both, "default"), ([], None)]
    found = [leading(sections, name) for sections, name in cases]
    assert found == [both[0], both[1], named[0], named[1], both[0], None]
    for sections, name in ((named, "default"), (both, "b"), ([], "a")):
        with pytest.raises(ConfigError, match="no validation dataset is named"):
            leading(sections, name)


def test_invalid_metrics(trained: Path) -> None:
    for words, expected in WRONG.items():
        done = run_here(trained, "train", "-c", "cfg.yaml", *words)
        assert done.status == 2, (words, done)
        assert all(each in done.err for each in expected), (words, done.err)
    done = run_here(trained, "evaluate", "-c", "cfg.yaml", "--validation_dataset", "null")
    assert done.status == 2 and "evaluate measures on validation_dataset" in done.err


def test_early_stopping(trained: Path) -> None:
    """The run reports it and writes its weights; resumed from its checkpoint, it has no more patience than before."""
    words = "--early_stopping.patience", "2", "--early_stopping.min_delta", "100", "--step_scheduler.val_every_steps", "1"
    more = "--output_dir", "runs/early", "--step_scheduler.max_steps", "9"
    done = run_here(trained, "train", "-c", "cfg.yaml", *words, *more)
    assert done.status == 0 and "ended after step 3 of 9: the validation loss stopped improving" in done.out
    assert (trained / "runs" / "early" / "model.safetensors").exists()
    again = run_here(trained, "train", "-c", "cfg.yaml", *words, *more, "--checkpoint.restore_from", "LATEST")
    assert "ended after step 4 of 9" in again.out


def test_patience() -> None:
    config = EarlyStopping(patience=2, min_delta=0.1)
    patience = Patience()
    for loss, best, since in ((3.0, 3.0, 0), (2.95, 3.0, 1), (2.8, 2.8, 0), (2.8, 2.8, 1), (5.0, 2.8, 2)):
        assert not patience.is_over(config)
        patience = patience.after(loss, config)
        assert patience == (best, since)
    assert patience.is_over(config) and not patience.is_over(None)


def test_rows_without_weight_are_not_measured() -> None:
    logits, labels = torch.eye(4)[:, None, :], torch.tensor([[0], [1], [0], [-100]])
    batch: dict[str, Any] = {"labels": labels, COUNTS: torch.tensor([1.0, 1.0, 1.0, 0.0])}
    mean = lambda outputs, microbatch: (outputs.argmax(-1) == microbatch["labels"]).float().mean()  # noqa: E731
    loss = measured(af.losses.causal_lm, 4, {"pair": accuracy, "mean": mean})
    _, _, aux = loss(logits, batch)
    assert aux["pair"].tolist() == [2.0, 3.0] and aux["mean"].tolist() == [0.5 * 0.75, 0.75]
    _, weight, aux = loss(logits * float("nan"), {**batch, COUNTS: torch.zeros(4)})
    assert weight == 0 and not any(each.any() for each in aux.values())
    with pytest.raises(BatchError, match="'labels' has shape"):
        accuracy(logits, {"labels": labels[0]})


def test_display_names() -> None:
    names = {"validation_dataset": "validation", "validation_dataset_a_dataset": "validation a_dataset"}
    assert {section: display_name(section) for section in names} == names
    curves = [curve.label for curve in _losses(names)]
    assert curves == list(names.values())
