"""Labels shifted twice: found before training, whatever wraps the dataset and whoever wrote the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import autofunc as af
from autofunc.checks import shift_warning
from autofunc.train.labels import aligned, inside
from tests.cli.here import run_here

NET = """
import torch
from torch import nn
from autofunc.data import TextFolder

class Net(nn.Module):
    def __init__(self, shifts):
        super().__init__()
        self.shifts = shifts
        self.layers = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    def forward(self, input_ids, labels):
        logits = self.layers(input_ids)
        if self.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

def build(shifts=True): return Net(shifts)
def text(aligned=True): return TextFolder("text.txt", seq_len=16, aligned_labels=aligned)
def subset(): return torch.utils.data.Subset(text(), range(9))
def concat(): return torch.utils.data.ConcatDataset([text(), text()])
def nested(): return torch.utils.data.Subset(concat(), range(9))
def own(): return [dict(row) for row in (text()[i] for i in range(9))]
def raw(): return text(False)
def alike():  # rows that begin with the same token
    ids = [(torch.arange(9) * (i + 1)) % 32 for i in range(8)]
    return [{"input_ids": each[:-1], "labels": each[1:]} for each in ids]
"""


MASKED = """
class Logits(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(256, 8), nn.Linear(8, 256))
    def forward(self, input_ids):
        return super().forward(input_ids)

def mean(outputs, batch): return nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())
def summed(outputs, batch):
    labels = batch["labels"].flatten()
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels, reduction="sum"), (labels != -100).sum()
def whole(): return [dict(row) for row in (text()[i] for i in range(8))]
def masked():
    rows = whole()
    for row in rows[::3]:
        row["labels"] = row["labels"].masked_fill(torch.arange(16) > 3, -100)
    return rows
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 10)
    return tmp_path


def run(folder: Path, dataset: str, shifts: bool, weights: str = "own") -> str:
    (folder / "run.yaml").write_text(f"""
        model: {{_target_: net.py:build, shifts: {str(shifts).lower()}}}
        weights: {weights}
        dataset: {{_target_: net.py:{dataset}}}
        step_scheduler: {{global_batch_size: 4, local_batch_size: 2, max_steps: 1}}
        optimizer: {{_target_: torch.optim.SGD, lr: 0.1}}
    """)
    done = run_here(folder, "finetune", "llm", "-c", "run.yaml")
    assert done.status in (0, 2)
    return done.err


@pytest.mark.parametrize("dataset", ["text", "subset", "concat", "nested", "own"])
def test_shifted_twice(folder: Path, dataset: str) -> None:
    error = run(folder, dataset, shifts=True)
    assert (
        "error: loss_fn: the model computes its own loss and shifts the labels itself" in error and error.count("\n") == 1
    )


@pytest.mark.parametrize(("dataset", "shifts"), [("text", False), ("raw", True), ("alike", False)])
def test_shifted_once(folder: Path, dataset: str, shifts: bool) -> None:
    assert run(folder, dataset, shifts) == ""


def test_without_weights(folder: Path) -> None:
    assert "the model computes its own loss and shifts the labels itself" in run(folder, "text", True, "seed")
    assert run(folder, "text", False, "seed") == run(folder, "raw", True, "seed") == ""


def test_without_known_initialisers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that are shifted before they meet any weight are detected from the batch alone."""
    monkeypatch.setattr("autofunc.checks.existing_model._MOST_BYTES", 0)
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=32, n_positions=8, resid_pdrop=0.0)
    model = af.from_module(af.AutoModel.from_config(config), batch)
    assert "the model shifts 'labels' itself" in shift_warning(model, batch)


@pytest.mark.parametrize("weights", ["own", "seed"])
def test_a_mean_of_means_is_noted(folder: Path, weights: str) -> None:
    (folder / "net.py").write_text(NET + MASKED)
    for dataset, loss, noted in (
        ("masked", "net.py:mean", True),
        ("whole", "net.py:mean", False),
        ("masked", "net.py:summed", False),
    ):
        (folder / "run.yaml").write_text(f"""
            model: {{_target_: net.py:Logits}}
            weights: {weights}
            inputs: [input_ids]
            loss_fn: {{_target_: {loss}}}
            dataset: {{_target_: net.py:{dataset}}}
            step_scheduler: {{global_batch_size: 4, local_batch_size: 2, max_steps: 1}}
            optimizer: {{_target_: torch.optim.SGD, lr: 0.1}}
            output_dir: {dataset}_{loss[-4:]}
        """)
        done = run_here(folder, "finetune", "llm", "-c", "run.yaml")
        assert done.status == 0, done.err
        assert ("note: loss_fn: the loss is a mean over labels" in done.out) is noted, (dataset, loss)


def test_aligned() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    following = ids.roll(-1, 1)
    assert aligned({"input_ids": ids, "labels": following})
    assert aligned({"input_ids": ids, "labels": following.masked_fill(ids < 3, -100)})
    assert not aligned({"input_ids": ids, "labels": ids})
    assert not aligned({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert not aligned({"input_ids": torch.ones_like(ids), "labels": torch.ones_like(ids)}), "it cannot be told"
    assert not aligned({"input_ids": ids, "labels": ids[:, 0]})
    pair = [{"input_ids": ids}], [{"input_ids": ids}]
    whole = torch.utils.data.ConcatDataset(pair)  # type: ignore[type-var]
    assert [id(each) for each in inside(whole)] == [id(whole), *map(id, pair)]
