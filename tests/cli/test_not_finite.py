"""A training run whose loss is not finite reports where it began, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.here import run_here
from tests.cli.test_finetune import start

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.seen = nn.Embedding(256, 8), nn.Linear(8, 256), None
        self.mid = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.mid:
            x = block(x).tanh()
        none = 1.0 - (input_ids == 122).any().float()  # no z in the microbatch
        x = x + PLANTED
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

def build():
    return Net()
"""

RUN = """
model: {_target_: net.py:build}
dataset: {_target_: autofunc.data.TextFolder, path: text.txt, seq_len: 8}
dataloader: {shuffle: false}
step_scheduler: {global_batch_size: 8, local_batch_size: 2}
distributed: {pp_size: 2, split_points: [mid.1]}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
"""


FORWARD, GRADIENT = "torch.log(none)", "torch.sqrt(none * x.square().mean())"
"""The second value is 0 and its gradient NaN."""


def folder_of(tmp_path: Path, planted: str = FORWARD) -> Path:
    (tmp_path / "net.py").write_text(MODEL.replace("PLANTED", planted))
    text = list("abcdefg " * 40)
    text[9 * 12 + 4] = "z"  # in the second step: row 14, so microbatch 3
    (tmp_path / "text.txt").write_text("".join(text))
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def assert_told(text: str, layer: str) -> None:
    assert "the loss is" in text and "at step 2" in text
    assert f"forward: layer {layer!r} makes" in text, text
    assert "microbatch 3" in text and "Traceback" not in text.splitlines()[-1]


def test_in_one_process(tmp_path: Path) -> None:
    done = run_here(
        folder_of(tmp_path), "finetune", "llm", "-c", "run.yaml", "--distributed.pp_size", "1",
        "--distributed.split_points", "null",
    )  # fmt: skip
    assert done.status == 1
    assert_told(done.err, "mid.1")


def test_nonfinite_gradient_of_a_finite_loss(tmp_path: Path) -> None:
    """It is found before the update, after which every value is NaN."""
    done = run_here(
        folder_of(tmp_path, GRADIENT), "finetune", "llm", "-c", "run.yaml", "--distributed.pp_size", "1",
        "--distributed.split_points", "null",
    )  # fmt: skip
    assert done.status == 1
    assert "the gradient's norm is nan at step 2" in done.err and "microbatch 3" in done.err, done.err
    assert "backward" in done.err and "mid.1" in done.err, done.err


@pytest.mark.full
def test_on_two_processes(tmp_path: Path) -> None:
    assert_told(start(folder_of(tmp_path), "finetune", "llm", "-c", "run.yaml").stderr, "mid.1")


@pytest.mark.full
def test_two_processes_skip_together(tmp_path: Path) -> None:
    """The first rank reports what the second found, and both continue."""
    done = start(folder_of(tmp_path), "finetune", "llm", "-c", "run.yaml", "--nonfinite", "skip")
    assert done.returncode == 0, done.stderr
    assert_told(done.stdout, "mid.1")
    assert "at rank 1, step 2" in done.stdout and "step 5/5" in done.stdout
