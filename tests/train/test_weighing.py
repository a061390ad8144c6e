"""A run's loss is a mean over the dataset's rows, each weighted equally, whatever pads the last batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.cli.here import run_here

PARTS = """
import torch
from torch import nn

def build(own=False):
    torch.manual_seed(1)
    return Own() if own else nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = build()
    def forward(self, input, labels):
        return {"loss": cross_entropy(self.layers(input), {"labels": labels})}

def cross_entropy(outputs, rows):
    return nn.functional.cross_entropy(outputs, rows["labels"])

def summed(outputs, rows):
    return nn.functional.cross_entropy(outputs, rows["labels"], reduction="sum"), (rows["labels"] != -100).sum()

def squares(outputs, rows):
    return (outputs - rows["labels"]).square().mean()

def rows(count, masked=(), numbers=False):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    labels = -100.0 + x if numbers else x.argmax(1)
    labels[list(masked)] = -100
    return [{"input": each, "labels": label} for each, label in zip(x, labels)]
"""


def finetune(folder: Path, **sections: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor], str]:
    folder.mkdir(exist_ok=True)
    (folder / "parts.py").write_text(PARTS)
    config = {
        "model": {"_target_": "parts.py:build"},
        "loss_fn": {"_target_": "parts.py:cross_entropy"},
        "dataset": {"_target_": "parts.py:rows", "count": 15},
        "validation_dataset": {"_target_": "parts.py:rows", "count": 11},
        "dataloader": {"shuffle": False},
        "step_scheduler": {"global_batch_size": 8, "local_batch_size": 4},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5},
        "output_dir": "out",
        **sections,
    }
    (folder / "run.yaml").write_text(json.dumps({name: each for name, each in config.items() if each is not None}))
    done = run_here(folder, "finetune", "llm", "-c", "run.yaml")
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    losses, validation = ([line[key] for line in lines if key in line] for key in ("loss", "validation_loss"))
    return losses, validation, load_file(folder / "out" / "model.safetensors"), done.out


def plain(loss: str = "cross_entropy", **data: Any) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """The same without microbatches: each step uses all labelled rows of its batch."""
    scope: dict[str, Any] = {}
    exec(PARTS, scope)
    model: nn.Module = scope["build"]()

    def loss_of(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        rows = [row for row in rows if row["labels"].is_floating_point() or row["labels"] != -100]
        outputs = model(torch.stack([row["input"] for row in rows]))
        return scope[loss](outputs, {"labels": torch.stack([row["labels"] for row in rows])})  # type: ignore[no-any-return]

    losses, rows = [], scope["rows"](15, **data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in (rows[:8], rows[8:]):
        optimizer.zero_grad()
        value = loss_of(batch)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.item())
    with torch.no_grad():
        return losses, loss_of(scope["rows"](11, **data)).item(), model.state_dict()


@pytest.mark.parametrize(
    ("sections", "loss", "data"),
    [
        ({}, "cross_entropy", {}),
        ({"loss_fn": None, "model": {"_target_": "parts.py:build", "own": True}}, "cross_entropy", {}),
        ({}, "cross_entropy", {"masked": [1, 8, 9, 10]}),
        ({"loss_fn": {"_target_": "parts.py:squares"}}, "squares", {"numbers": True}),
    ],
    ids=["a mean", "the model's own", "rows without labels", "numbers of about -100"],
)
def test_a_mean_is_one_over_real_rows(
    tmp_path: Path, sections: dict[str, Any], loss: str, data: dict[str, Any]
) -> None:  # fmt: skip
    dataset = {"_target_": "parts.py:rows", "count": 15, **data}
    losses, validation, weights, _ = finetune(
        tmp_path, dataset=dataset, validation_dataset={**dataset, "count": 11}, **sections
    )
    expected, expected_validation, expected_weights = plain(loss, **data)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert validation == pytest.approx([expected_validation], rel=1e-6)
    for name, leaf in expected_weights.items():
        found = weights[name if name in weights else f"layers.{name}"]
        torch.testing.assert_close(found, leaf, atol=1e-6, rtol=2e-6)


def test_a_sum_with_its_own_weight(tmp_path: Path) -> None:
    losses, validation, _, _ = finetune(tmp_path, loss_fn={"_target_": "parts.py:summed"})
    expected, expected_validation, _ = plain()
    assert [*losses, *validation] == pytest.approx([*expected, expected_validation], abs=1e-6)


def test_validation_rows_without_labels(tmp_path: Path) -> None:
    for count, masked in ((16, range(8)), (9, [8])):  # a whole batch, and all of what is left
        validation_dataset = {"_target_": "parts.py:rows", "count": count, "masked": list(masked)}
        _, (loss,), weights, _ = finetune(tmp_path / str(count), validation_dataset=validation_dataset)
        assert 0 < loss < 10 and weights


def test_dropped_rows_are_noted(tmp_path: Path) -> None:
    losses, validation, _, out = finetune(tmp_path, dataloader={"shuffle": False, "drop_last": True})
    assert len(losses) == len(validation) == 1
    assert "note: dataset: drop_last drops 7 of its 15 rows" in out
    assert "note: validation_dataset: drop_last drops 3 of its 11 rows" in out
