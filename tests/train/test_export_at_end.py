"""A run that leaves a folder for transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autofunc.data import ByteTokenizer
from autofunc.train.tokenizers import keep_tokenizer
from tests.cli.here import run_here
from tests.cli.test_finetune import CONFIG
from tests.data.tokenizers import write_tokenizer

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 4), nn.Linear(4, 256)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    (tmp_path / "own.py").write_text(OWN)
    text = CONFIG.replace("pp_size: 2, split_points: [h.1]", "engine: eager").replace("max_steps: 6", "max_steps: 1")
    (tmp_path / "cfg.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("more", [(), ("--checkpoint.save_consolidated", "false")], ids=["with weights", "alone"])
def test_the_folder_is_the_trained_model(folder: Path, more: tuple[str, ...]) -> None:
    done = run_here(folder, "train", "-c", "cfg.yaml", "--export", "model", "--output_dir", "out", *more)
    assert done.status == 0 and "model/" in done.out, done.err
    assert (folder / "out" / "model.safetensors").exists() == (not more)
    module = AutoModelForCausalLM.from_pretrained(folder / "out" / "model")
    if not more:
        written = run_here(folder, "export", "-c", "cfg.yaml", "--weights", "out", "-o", "later")
        assert written.status == 0, written.err
        other = AutoModelForCausalLM.from_pretrained(folder / "later").state_dict()
        assert all(torch.equal(leaf, other[name]) for name, leaf in module.state_dict().items())


def test_unexportable_models_are_refused_before_the_start(folder: Path) -> None:
    text = (folder / "cfg.yaml").read_text()
    (folder / "own.yaml").write_text("model: {_target_: own.py:Net}\nexport: model\n" + text[text.index("dataset:") :])
    for words, said in (
        (("--export", "/model"), "export: '/model' is not in output_dir"),
        (("--export", "../model"), "is not in output_dir"),
        (("-c", "own.yaml"), "export: Net has no config attribute"),
    ):
        given = words if "-c" in words else ("-c", "cfg.yaml", *words)
        done = run_here(folder, "train", *given)
        assert done.status == 2 and said in done.err, (words, done.err)
        assert not (folder / "runs").exists()


def test_the_folder_has_the_datasets_tokenizer(folder: Path) -> None:
    name = write_tokenizer(folder / "pieces")
    text = (folder / "cfg.yaml").read_text().replace("vocab_size: 256", "vocab_size: 512")
    text = text.replace("path: corpus,", "path: corpus, tokenizer: pieces,")
    (folder / "pieces.yaml").write_text(text)
    words = ("--export", "model", "--output_dir", "out", "--checkpoint.save_consolidated", "false")
    done = run_here(folder, "train", "-c", "pieces.yaml", *words)
    assert done.status == 0, done.err
    left = AutoTokenizer.from_pretrained(folder / "out" / "model")
    given = AutoTokenizer.from_pretrained(name)
    asked = "the question is it?<|end|>"
    assert left(asked)["input_ids"] == given(asked)["input_ids"] and left.chat_template == given.chat_template
    made = run_here(folder, "generate", "--model", "out/model", "--prompt", "the question", "--max-new-tokens", "2")
    assert made.status == 0 and made.out.startswith("the question"), made.err

    exported = folder / "out" / "model"
    keep_tokenizer(object(), exported)  # of which nothing is known
    assert (exported / "tokenizer.json").exists()
    keep_tokenizer(SimpleNamespace(tokenizer=ByteTokenizer()), exported)  # by a later run, into the same folder
    assert {each.name for each in exported.iterdir()} == {"config.json", "model.safetensors"}
