"""Datasets and loaders."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from autofunc.data import HellaSwag, TextFolder, load_tokenizer
from autofunc.errors import DataError

SAMPLE = Path(__file__).parent.parent.parent / "examples" / "data" / "hellaswag_sample.jsonl"


def as_text(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("second file. " * 20)
    (tmp_path / "a.txt").write_text("first file. " * 20)
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "notes.md").write_text("other suffix")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "installed.txt").write_text("not mine")
    return tmp_path


def test_files_are_joined_in_order(folder: Path) -> None:
    data = TextFolder(str(folder), seq_len=10, suffixes=[".txt"])
    assert data.num_files == 2 and data.vocab_size == 256
    rows = [data[index] for index in range(len(data))]
    text = "".join(as_text(row["input_ids"]) for row in rows)
    assert text.startswith("first file. first") and "second file" in text and "mine" not in text and "other" not in text
    assert all(torch.equal(row["labels"][:-1], row["input_ids"][1:]) for row in rows), "labels are aligned"
    assert rows[0]["labels"][-1] == rows[1]["input_ids"][0]
    assert rows[0]["input_ids"].dtype == torch.int64


def test_validation_is_apart(folder: Path) -> None:
    train, validation = (TextFolder(str(folder), split=s, seq_len=5) for s in ("train", "validation"))
    assert len(validation._tokens) == (len(train._tokens) + len(validation._tokens)) // 20
    many = folder / "many"
    many.mkdir()
    for index in range(40):
        (many / f"{index:02}.txt").write_text(f"[file {index:02}]" * 4)
    text = as_text(torch.cat([row["input_ids"] for row in TextFolder(str(many), split="validation", seq_len=4)]))
    assert "[file 19]" in text and "[file 39]" in text and "[file 18]" not in text
    assert "file 19" not in as_text(torch.cat([row["input_ids"] for row in TextFolder(str(many), seq_len=4)]))


def test_a_limit_takes_rows_evenly(folder: Path) -> None:
    data = TextFolder(str(folder), seq_len=10, num_samples_limit=4)
    assert len(data) == 4 and {as_text(data[index]["input_ids"])[0] for index in range(4)} != {"f"}


def test_the_default_is_the_standard_library() -> None:
    data = TextFolder(split="validation", num_samples_limit=8)
    assert len(data) == 8 and len(data._tokens) > 100_000 and "lib" in repr(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "/nowhere"}, "/nowhere is neither a folder nor a file"),
        ({"split": "valid"}, "did you mean validation"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"seq_len": 10**9}, "too few for one row of seq_len=1000000000"),
        ({"tokenizer": "./no-such-tokenizer"}, "tokenizer './no-such-tokenizer' cannot be loaded"),
    ],
)
def test_text_folders_that_cannot_be(folder: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextFolder(**{"path": str(folder), **arguments})  # type: ignore[arg-type]


def write_tokenizer(folder: Path) -> str:
    """A small word-level tokenizer of transformers, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[UNK]", "first", "second", "file", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_of_transformers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    assert load_tokenizer(name).vocab_size == 5
    data = TextFolder(str(folder), seq_len=3, tokenizer=name, suffixes=[".txt"])
    assert data[0]["input_ids"].tolist() == [1, 3, 4] and data.vocab_size == 5
    swag = HellaSwag(str(SAMPLE), tokenizer=name)
    assert swag.vocab_size == 5 and swag[0]["input_ids"].max() < 5


def test_hellaswag_learns_the_right_ending() -> None:
    examples = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    data = HellaSwag(str(SAMPLE))
    assert len(data) == len(examples) and data.seq_len % 8 == 0
    for example, row in zip(examples, data, strict=True):
        counted = row["labels"] != -100
        ending = " " + example["endings"][int(example["label"])]
        assert as_text(row["labels"][counted]) == ending
        length = len((example["ctx"] + ending).encode()) - 1
        assert as_text(row["input_ids"][:length]) == (example["ctx"] + ending)[:-1]
        assert torch.equal(
            row["input_ids"][1:length], row["labels"][: length - 1].where(counted[: length - 1], row["input_ids"][1:length])
        )


def test_hellaswag_cuts_contexts_on_the_left() -> None:
    full, short = HellaSwag(str(SAMPLE)), HellaSwag(str(SAMPLE), seq_len=24, num_samples_limit=3)
    assert len(short) == 3
    for row, whole in zip(short, full, strict=False):
        ending = whole["labels"][whole["labels"] != -100]
        assert torch.equal(row["labels"][row["labels"] != -100], ending[-24:])


def test_hellaswag_from_a_folder_with_splits(tmp_path: Path) -> None:
    lines = SAMPLE.read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:3]))
    (tmp_path / "validation.jsonl").write_text("\n".join(lines[3:5]))
    assert len(HellaSwag(str(tmp_path))) == 3 and len(HellaSwag(str(tmp_path), split="validation")) == 2


def test_hellaswag_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder 'missing.jsonl'"):
        HellaSwag("missing.jsonl")
    for bad in ({"seq_len": -3}, {"num_samples_limit": 0}):
        with pytest.raises(DataError, match="expected at least 1"):
            HellaSwag(str(SAMPLE), **bad)  # type: ignore[arg-type]
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text('{"ctx": "a", "endings": ["b"], "label": ""}\n')
    with pytest.raises(DataError, match=r"line 1 of .*unlabelled\.jsonl: label '' with 1 endings"):
        HellaSwag(str(unlabelled))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="has no column 'ctx'; found text, expected ctx, endings, label"):
        HellaSwag(str(other))
    (tmp_path / "table.txt").write_text("x")
    with pytest.raises(DataError, match=r"is \.txt; expected .json"):
        HellaSwag(str(tmp_path / "table.txt"))
    with pytest.raises(DataError, match="'nobody/hellaswag', split 'train', cannot be loaded"):
        HellaSwag("nobody/hellaswag")


def test_hellaswag_from_csv(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    for endings in ('["sits down.", "sings."]', "['sits down.', 'sings.']"):
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["ctx", "endings", "label"], ["He", endings, 0]])
        row = HellaSwag(str(table))[0]
        assert bytes(row["labels"][row["labels"] != -100].tolist()) == b" sits down."
    for endings in ("sits down.", "[1, 2]", "[]"):
        table.write_text(f'ctx,endings,label\nHe,"{endings}",0\n')
        with pytest.raises(DataError, match="expected a list of strings, in a CSV file as JSON"):
            HellaSwag(str(table))
