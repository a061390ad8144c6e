"""Rows of different lengths: filled up to few shapes, the same on all places, and without a change to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.batch import COUNTS
from autofunc.data import MockDataset, Padded, Padding, first_rows, make_loader
from autofunc.errors import DataError
from stages.gpt2 import build_gpt2_model
from tests.cli.here import run_here


def parts(dataset: Any, **given: Any) -> list[Any]:
    return list(make_loader(dataset, 8, **{"microbatch": 2, "seed": 3, "shuffle": True, **given}))


def test_mock_rows_depend_on_seed_and_index() -> None:
    one, same, other = MockDataset(50, 9, 6, seed=1), MockDataset(50, 9, 6, seed=1), MockDataset(50, 9, 6, seed=2)
    backwards = [same[index] for index in reversed(range(6))][::-1]
    assert all(torch.equal(one[index]["input_ids"], backwards[index]["input_ids"]) for index in range(6))
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])
    assert not torch.equal(one[0]["input_ids"], one[1]["input_ids"])
    assert (
        torch.equal(one[3]["input_ids"][1:], one[3]["labels"][:-1]) and max(map(max, (r["labels"] for r in backwards))) < 50
    )
    raw = MockDataset(50, 9, 6, seed=1, aligned_labels=False)[2]
    assert torch.equal(raw["input_ids"], raw["labels"]) and torch.equal(raw["labels"], one[2]["input_ids"])
    lengths = [len(MockDataset(50, 9, 40, min_seq_len=3)[index]["labels"]) for index in range(40)]
    assert (min(lengths), max(lengths)) == (3, 9) and len(list(MockDataset(5, 2, 3))) == 3
    for wrong in ({"vocab_size": 0}, {"num_samples": 0}, {"seq_len": 0}, {"seed": -1}, {"min_seq_len": 9, "seq_len": 8}):
        with pytest.raises(DataError, match=r"MockDataset: .*expected at least 1"):
            MockDataset(**wrong)


@pytest.mark.parametrize("padding", [Padding(4), Padding(lengths=(5, 9, 16))])
def test_few_shapes_and_all_rows(padding: Padding) -> None:
    rows = MockDataset(50, 16, 21, min_seq_len=1)
    dataset = Padded(rows, padding)
    allowed = range(4, 17, 4) if padding.multiple_of else padding.lengths
    together = parts(dataset)
    lengths = {part.batch["labels"].shape[1] for part in together}
    assert lengths <= set(allowed) and len(lengths) > 1
    taught = sum(int((part.batch["labels"][part.batch[COUNTS] > 0] != -100).sum()) for part in together)
    assert taught == sum(len(rows[index]["labels"]) for index in range(21)), "no label is lost, and none is there twice"
    for whole, *placed in zip(together, *(parts(dataset, place=place, places=2) for place in (0, 1)), strict=True):
        assert all(
            torch.equal(torch.cat([p.batch[name] for p in placed]), whole.batch[name]) for name in ("labels", COUNTS)
        )


def test_the_loss_is_that_of_the_rows_alone() -> None:
    model = build_gpt2_model(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    rows = MockDataset(50, 16, 7, min_seq_len=2)
    params = model.init(seed=0)
    each = [first_rows(Padded(rows, Padding(1)), 1, start) for start in range(7)]
    sums = [af.losses.causal_lm(model(params, batch), batch) for batch in each]
    alone = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
    for padding in (Padding(1), Padding(8), Padding(lengths=(16,))):
        batch = first_rows(Padded(rows, padding), 7)
        total, weight = af.losses.causal_lm(model(params, batch), batch)
        assert (total / weight).item() == pytest.approx(alone.item(), abs=1e-6)


def test_what_is_filled_up() -> None:
    """Whatever is as long as the row; masks and positions with zeros, pairs on both sides."""
    row = {"input_ids": torch.arange(1, 4), "target_ids": torch.arange(3), "size": torch.ones(2)}
    row |= {"attention_mask": torch.ones(3), "pairs": torch.ones(3, 3)}
    batch = first_rows(Padded([row], Padding(4)), 1)  # type: ignore[arg-type]
    assert {name: leaf[0].tolist() for name, leaf in batch.items() if name != "pairs"} == {
        "input_ids": [1, 2, 3, 0], "target_ids": [0, 1, 2, -100], "attention_mask": [1, 1, 1, 0], "size": [1, 1]
    }  # fmt: skip
    assert batch["pairs"][0].sum() == 9 and batch["pairs"].shape == (1, 4, 4)
    wrong: list[tuple[dict[str, Tensor], Padding, str]] = [
        (row, Padding(lengths=(2,)), "a row has 3 tokens, and dataloader.pad_seq_len_to has at most 2"),
        ({"pixels": torch.ones(3)}, Padding(4), "length of input_ids.*got none, but pixels"),
        ({"input_ids": torch.ones(2, 3)}, Padding(4), r"got \(2, 3\)"),
    ]
    for given, padding, message in wrong:
        with pytest.raises(DataError, match=message):
            first_rows(Padded([given], padding), 1)  # type: ignore[arg-type]


def test_a_row_with_labels_stands_in_at_its_length() -> None:
    """A microbatch without any gets the first row that has some, whole."""
    rows = [{"input_ids": torch.ones(2, dtype=torch.int64), "labels": torch.full((2,), -100)} for _ in range(4)]
    rows.append({"input_ids": torch.ones(7, dtype=torch.int64), "labels": torch.tensor([-100] * 6 + [5])})
    dataset = Padded(rows, Padding(4))
    (first, _) = make_loader(dataset, 4, microbatch=2, seed=0, shuffle=False)
    assert (first.batch["labels"] == 5).sum() == 4 and not first.batch[COUNTS].any()


CONFIG = """
model: {_target_: stages.gpt2.build_gpt2_model, vocab_size: 50, n_positions: 16, n_embd: 16, n_layer: 2, n_head: 2}
dataset: {_target_: autofunc.data.MockDataset, vocab_size: 50, seq_len: 16, min_seq_len: 3, num_samples: 21}
validation_dataset: {_target_: autofunc.data.MockDataset, vocab_size: 50, seq_len: 12, min_seq_len: 2, num_samples: 9}
distributed: {engine: eager}
dataloader: {pad_seq_len_to: [12, 16, 8]}
step_scheduler: {global_batch_size: 8, local_batch_size: 2}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-2}
"""


def test_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    words = "train", "-c", "run.yaml"
    done = run_here(tmp_path, *words)
    assert done.status == 0 and "rows of 3 to 16 (seed 0), padded to 8, 12, 16" in " ".join(done.out.split()), done.err
    cases = {
        ("--dataset.seq_len", "17"): "a row has 17 tokens, and dataloader.pad_seq_len_to has at most 16",
        ("--dataloader.pad_seq_len_to", "[8, 32]"): "the model on a batch of dataset: gpt2: a sequence of 32 tokens",
        ("--dataloader.pad_seq_len_divisible", "8"): "give one of them",
        ("--dataloader", "{pad_seq_len_to: []}"): "dataloader.pad_seq_len_to",
    }
    for more, message in cases.items():
        done = run_here(tmp_path, *words, *more)
        assert done.status == 2 and message in done.err, (more, done)
