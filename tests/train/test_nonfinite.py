"""A step that is not finite ends the run, is skipped without a trace, or is taken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from autofunc.config import parse_config
from autofunc.data import START, Part
from autofunc.train.batches import Batch
from autofunc.train.bubble import BubbleMeter
from autofunc.train.loop import build_pipe
from autofunc.train.nonfinite import NonFinite
from autofunc.train.recipe import prepare
from autofunc.train.resume import fresh
from autofunc.train.step import Taken, take_step
from autofunc.train.weighing import counting_all
from autofunc.tree import flatten
from tests.cases import assert_same_tree
from tests.cli.here import run_here

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))

def build():
    torch.manual_seed(3)
    return Net()

def loss(outputs, rows):
    return (outputs - rows["y"]).square().mean()

def rows(count=24, bad=()):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    x[list(bad)] = float("nan")
    return [{"x": each, "y": each.sum(0, keepdim=True)} for each in x]
"""
CONFIG: dict[str, Any] = {
    "model": {"_target_": "net.py:build"}, "loss_fn": {"_target_": "net.py:loss"}, "dataset": {"_target_": "net.py:rows"},
    "dataloader": {"shuffle": False}, "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1}, "output_dir": "out",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "run.yaml").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps(batches: list[int], bad: float | None, messages: list[str], **keys: Any) -> list[Taken]:
    """Take steps on numbered batches; the first microbatch of number 1 has `bad` in its labels."""
    recipe = prepare(parse_config({**CONFIG, **keys}))
    pipe, device = build_pipe(recipe, None), torch.device("cpu")
    now, found = fresh(recipe, pipe, device).trained, []
    nonfinite, meter = NonFinite(recipe.nonfinite, recipe.max_skips, messages.append), BubbleMeter(None, device, 100)
    for step, batch in enumerate(batches, start=1):
        rows = [recipe.dataset[index] for index in range(4 * batch, 4 * batch + 4)]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if batch == 1 and bad is not None:
            stacked["y"][0] = bad
        part = Part(counting_all(stacked), num_rows=4, ends_batch=True, after=START)
        found.append(take_step(recipe, pipe, now, Batch.of([part], device), step, device, meter, nonfinite))
        now = found[-1].now
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30], ids=["NaN", "infinite", "a gradient that overflows"])
@pytest.mark.parametrize("keys", [{}, {"distributed": {"pp_size": 1, "engine": "eager"}}], ids=["graph", "eager"])
def test_a_skipped_step_leaves_no_trace(folder: Path, bad: float, keys: dict[str, Any]) -> None:
    """Parameters, optimizer and running statistics are unchanged, bit for bit."""
    messages: list[str] = []
    with_it = steps([0, 1, 2, 1, 3], bad, messages, nonfinite="skip", **keys)
    without = steps([0, 2, 3], None, [], **keys)
    assert [each.is_skipped for each in with_it] == [False, True, False, True, False]
    assert_same_tree(without[-1].now.params, with_it[-1].now.params)
    assert_same_tree(without[-1].now.state, with_it[-1].now.state)
    assert_same_tree(without[-1].now.optimizer_state, with_it[-1].now.optimizer_state)
    assert flatten(with_it[-1].now.state), "it has some"
    first, second = messages
    assert "at step 2; " in first and "stage 0, microbatch 0" in first and "rank 0" in first, first
    assert first.endswith("the step is skipped (nonfinite: skip), the first so far")
    assert second.endswith("at step 4\nthe step is skipped (nonfinite: skip), the second so far"), "it is not run again"


def test_warn_takes_the_step(folder: Path) -> None:
    messages: list[str] = []
    taken = steps([0, 1], math.nan, messages, nonfinite="warn")[-1]
    assert not taken.is_skipped and math.isnan(flatten(taken.now.params)["first.weight"].sum())
    assert len(messages) == 1 and "the step is taken (nonfinite: warn)" in messages[0]


def test_a_run(folder: Path) -> None:
    words = "finetune", "llm", "-c", "run.yaml", "--nonfinite", "skip", "--dataset.bad"
    done = run_here(folder, *words, "[5]", "--tensorboard.enable", "false")
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["loss"] is None, line.get("skipped")) for line in lines] == [
        (step == 1, True if step == 1 else None) for step in range(6)
    ]
    assert "forward: layer" in done.out and "entry 'x' of the batch is not finite" in " ".join(done.out.split())
    ended = run_here(folder, *words, "[4,8,12,16]", "--max_skips", "3", "--output_dir", "other")
    assert ended.status == 1 and "at step 5, after 3 skipped steps (max_skips); forward: layer" in ended.err
    stopped = run_here(folder, *words, "[5]", "--nonfinite", "stop", "--output_dir", "third")
    assert stopped.status == 1 and "the loss is nan at step 2; forward: layer" in stopped.err
    assert run_here(folder, *words, "[5]", "--nonfinite", "drop").status == 2
