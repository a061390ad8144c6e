"""A plan without data: no dataset is read, and the assumptions are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.here import run_here

NET = """
import torch
from torch import nn

class Bare(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    def forward(self, input_ids):
        return self.layers(input_ids)

class Configured(Bare):
    def __init__(self, **sizes):
        super().__init__()
        self.config = sizes
"""
GPT2 = "{_target_: stages.gpt2.build_gpt2_model, vocab_size: 16, n_positions: 12, n_embd: 8, n_layer: 2, n_head: 2}"


@pytest.mark.parametrize(
    ("model", "dataset", "said"),
    [
        (GPT2, "seq_len: 5, path: nowhere", "5 tokens (dataset seq_len), with ids below 16 (the model's vocab_size)"),
        (GPT2, "path_or_dataset: no/such_dataset", "12 tokens (the model's n_positions), with ids below 16"),
        ("{_target_: net.py:Bare}", "max_length: 7", "7 tokens (dataset max_length), with ids below 2 (the model does"),
        ("{_target_: net.py:Bare}", "x: 1", "1024 tokens (assumed; dataset.seq_len sets it), with ids below 2"),
        (
            "{_target_: net.py:Configured, vocab_size: 9, max_position_embeddings: 4096}", "x: 1",
            "1024 tokens (assumed; dataset.seq_len sets it), with ids below 9",
        ),
    ],
)  # fmt: skip
def test_assumptions_are_printed(model: str, dataset: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "run.yaml").write_text(f"""
        model: {model}
        dataset: {{_target_: not_here.py:rows, {dataset}}}
        validation_dataset: {{_target_: not_here.py:rows}}
        step_scheduler: {{global_batch_size: 4, local_batch_size: 2, max_steps: 3, num_epochs: 1}}
        optimizer: {{_target_: torch.optim.SGD, lr: 0.1}}
    """)
    done = run_here(tmp_path, "plan", "-c", "run.yaml", "--fake-data")
    assert done.status == 0, done.err
    shown = " ".join(done.out.split())
    assert f"note: fake data: no dataset is read; rows are input_ids and labels of {said}" in shown
    assert "a batch: 4 rows, in dim 0 of input_ids, labels" in shown and "max_steps" not in shown
    assert "no validation_dataset" not in shown
    if "Bare" in model and "x" in dataset:
        done = run_here(tmp_path, "plan", "-c", "run.yaml")
        assert done.status == 2 and "not_here.py" in done.err, "without the flag the data is read"
