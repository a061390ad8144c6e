"""Packed documents: none sees another, and the loss is that of each alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import autofunc as af
from autofunc.data import PackedText, first_rows
from autofunc.data.packing import packed
from autofunc.errors import DataError
from tests.cli.here import run_here

WORDS = "the quick brown fox jumps over the lazy dog"


def write(folder: Path) -> str:
    """Documents of 1 to 43 bytes, and an empty one."""
    texts = [WORDS[: 3 * number + 1] for number in range(15)] + ["", WORDS]
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_which_documents_share_a_row() -> None:
    """Every token is in one piece, but for pieces of one token; rows are full, or no piece of others fits."""
    draws = np.random.default_rng(0)
    for length in (2, 7, 16):
        starts = np.cumsum([0, *draws.integers(0, 40, 60)])
        found = packed(starts, length)
        sizes = [found["lengths"][a:b].tolist() for a, b in zip(found["rows"], found["rows"][1:], strict=False)]
        assert all(sum(row) <= length and min(row) > 1 for row in sizes)
        covered = np.zeros(starts[-1], int)
        for begin, size in zip(found["begins"], found["lengths"], strict=True):
            covered[begin : begin + size] += 1
            inside = starts[np.searchsorted(starts, begin, side="right")]
            assert begin + size <= inside, "a piece is of one document"
        lost = [end - begin for begin, end in itertools.pairwise(starts) if (end - begin) % length == 1]
        assert covered.max() == 1 and (covered == 0).sum() == len(lost)
        room = sorted(length - sum(row) for row in sizes)
        assert sum(room) < length or room[-2] < 2 * length // 3, "little is left over"


def alone(row: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The documents of a row, each as a batch of its own."""
    begins = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), len(row["labels"])]
    parts = [{name: leaf[a:b][None] for name, leaf in row.items()} for a, b in itertools.pairwise(begins)]
    return [part for part in parts if (part["labels"] != -100).any()]


@pytest.mark.parametrize("aligned", [True, False])
def test_the_loss_is_that_of_each_document_alone(tmp_path: Path, aligned: bool) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).eval()
    data = PackedText(write(tmp_path), 24, aligned_labels=aligned)
    batch = first_rows(data, len(data))  # type: ignore[arg-type]
    loss = af.losses.causal_lm if aligned else None
    model = af.from_module(module, batch)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=len(data))
    pipe = af.pipeline(af.split(model, split_points=2), s, loss=loss)
    together, weights = [], []
    for row in (data[index] for index in range(len(data))):
        logits = [(module(input_ids=part["input_ids"]).logits, part["labels"]) for part in alone(row)]
        shifted = [(x[:, :-1], y[:, 1:]) if not aligned else (x, y) for x, y in logits]
        total = sum(torch.nn.functional.cross_entropy(x[0], y[0], reduction="sum") for x, y in shifted)
        weights.append(sum(int((y != -100).sum()) for _, y in shifted))
        together.append(total.item())
    expected = sum(together) / sum(weights) if aligned else np.mean([t / w for t, w in zip(together, weights, strict=True)])
    assert pipe(model.init(), batch).item() == pytest.approx(expected, abs=1e-6)
    at_once = pipe(model.init(), {**batch, "position_ids": torch.arange(24).expand(len(data), -1).contiguous()}).item()
    assert abs(at_once - expected) > 1e-3, "it is another if they see each other"
    texts = {bytes(part["input_ids"][0].tolist()).decode() for index in range(len(data)) for part in alone(data[index])}
    assert {WORDS[:4], WORDS[:7], WORDS[:22], WORDS[:24], WORDS[24:]} <= texts


def test_texts_that_cannot_be_packed(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for given, options, message in (
        (path, {"text_column": "content"}, "line 1 of .* has no column 'content'"),
        (str(tmp_path / "short.txt"), {}, "no document of two tokens"),
        (str(tmp_path / "empty"), {}, "empty has no files"),
        (str(tmp_path / "nowhere"), {}, "nowhere is neither a folder nor a file"),
        (path, {"seq_len": 1}, "seq_len - 1=0, expected at least 1"),
    ):
        with pytest.raises(DataError, match=f"PackedText: .*{message}"):
            PackedText(given, **{"seq_len": 8, **options})  # type: ignore[arg-type]
    limited = PackedText(path, 24, num_samples_limit=2)
    assert len(limited) == 2 and "2 rows of 24 tokens (bytes)" in repr(limited)


NETS = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1, max_position_embeddings=32))

class Mask(nn.Module):
    "With a mask of its own transformers takes positions for rotary angles only."
    def __init__(self):
        super().__init__()
        self.inner = llama()
    def forward(self, input_ids, position_ids):
        return self.inner(input_ids, torch.ones_like(input_ids), position_ids).logits

class Looks(nn.Module):
    "Positions are read, but attention looks at all that stands before."
    def __init__(self):
        super().__init__()
        self.ids, self.at, self.head = nn.Embedding(256, 8), nn.Embedding(32, 8), nn.Linear(8, 256)
    def forward(self, input_ids, position_ids):
        x = self.ids(input_ids) + self.at(position_ids)
        return self.head(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True))
"""
CONFIG = """
model: {_target_: net.py:llama}
dataset: {_target_: autofunc.data.PackedText, path: texts.jsonl, seq_len: 24}
loss_fn: {_target_: autofunc.losses.causal_lm}
step_scheduler: {global_batch_size: 4, local_batch_size: 2, max_steps: 1}
distributed: {engine: eager}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-2}
"""
GPT2 = (
    "--model",
    "{_target_: stages.gpt2.build_gpt2_model, vocab_size: 256, n_positions: 32, n_embd: 8, n_layer: 1, n_head: 1}",
)


def test_a_model_that_cannot_keep_them_apart_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "net.py").write_text(NETS)
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = run_here(tmp_path, "train", "-c", "run.yaml")
    assert done.status == 0, done.err
    done = run_here(tmp_path, "train", "-c", "run.yaml", "--output_dir", "gpt2", *GPT2)
    assert (
        done.status == 2
        and "dataset packs several documents into a row, and the model does not read position_ids" in done.err
    )
    for name in ("Looks", "Mask"):
        done = run_here(tmp_path, "train", "-c", "run.yaml", "--output_dir", name, "--model._target_", f"net.py:{name}")
        assert done.status == 1 and "the model lets them see each other: changing the first one" in done.err, name
