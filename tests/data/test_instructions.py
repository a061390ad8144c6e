"""Instructions and conversations: what is learnt of them, to the token."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from autofunc.data import ChatDataset, ColumnMappedTextInstructionDataset
from autofunc.errors import DataError
from tests.data.tokenizers import LAST_ONLY, MARKED, write_tokenizer

ROWS = [
    {"doc": "a table", "ask": "what is it?", "say": "the answer"},
    {"doc": "", "ask": "the question was two é", "say": "four, and four"},
]
MAPPING = {"context": "doc", "question": "ask", "answer": "say"}
TALK = [
    {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and the question?"}, {"role": "assistant", "content": "the answer is two"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {"turns": {}, "marked": {"template": MARKED}, "none": {"template": None}, "last": {"template": LAST_ONLY}}
    return {name: write_tokenizer(tmp_path_factory.mktemp(name), **given) for name, given in made.items()}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / name
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def learnt(data: Any, index: int, tokenizer: Any, *, aligned: bool = True) -> tuple[str, str]:
    """(What a row says, what of it is learnt)."""
    row = data[index]
    labels = row["labels"]
    if aligned:
        counted = labels[:-1] != -100
        counted[counted.nonzero().max()] = False  # the token after the last one is not in the row
        assert torch.equal(labels[:-1][counted], row["input_ids"][1:][counted]), "labels are aligned"
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(labels[labels != -100])


def test_columns_by_a_chat_template(tmp_path: Path, tokenizers: dict[str, str]) -> None:
    """All kinds of files give the same; tokens are those that the template gives for the whole."""
    name = tokenizers["turns"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    for file in ("a.jsonl", "a.csv", "a.parquet"):
        data = ColumnMappedTextInstructionDataset(write(tmp_path, file, ROWS), MAPPING, name)
        whole, answer = learnt(data, 0, tokenizer)
        assert whole.startswith(
            "<|start|>system\na table<|end|>\n<|start|>user\nwhat is it?<|end|>\n<|start|>assistant\nthe"
        )
        assert answer == "the answer<|end|>\n" and data.seq_len % 8 == 0
        assert learnt(data, 1, tokenizer)[1] == "four, and four<|end|>\n"
        messages = [{"role": "user", "content": ROWS[1]["ask"]}, {"role": "assistant", "content": ROWS[1]["say"]}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert data[1]["input_ids"][: len(ids) - 1].tolist() == ids[:-1]


def test_columns_without_a_template(tmp_path: Path, tokenizers: dict[str, str]) -> None:
    """The answer's first token has the space before it; the text's end is learnt. Bytes have no end."""
    path = write(tmp_path, "a.jsonl", ROWS)
    for name, options in ((tokenizers["none"], {}), (tokenizers["turns"], {"use_hf_chat_template": False})):
        tokenizer = AutoTokenizer.from_pretrained(name)
        data = ColumnMappedTextInstructionDataset(path, MAPPING, name, **options)
        assert learnt(data, 0, tokenizer)[1] == " the answer<eos>"
        whole, answer = learnt(data, 1, tokenizer)
        assert whole.startswith("the question was two é four, and four") and answer == " four, and four<eos>"
        everything = ColumnMappedTextInstructionDataset(path, MAPPING, name, answer_only_loss_mask=False, **options)
        first = tokenizer.decode(everything[0]["input_ids"][0])
        assert first + learnt(everything, 0, tokenizer)[1] == "a table what is it? the answer<eos>"
    data = ColumnMappedTextInstructionDataset(path, {"question": "ask", "answer": "say"})
    labels = data[1]["labels"]
    assert bytes(labels[labels != -100].tolist()).decode() == "four, and four"


@pytest.mark.parametrize(("kind", "first"), [("turns", "four<|end|>\n"), ("marked", "four<|end|>")])
def test_every_answer_of_a_conversation(tmp_path: Path, tokenizers: dict[str, str], kind: str, first: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers[kind])
    path = write(tmp_path, "a.jsonl", [{"messages": TALK}, {"messages": TALK[:2]}])
    data = ChatDataset(path, tokenizers[kind])
    assert learnt(data, 0, tokenizer)[1] == first + first.replace("four", "the answer is two")
    assert learnt(data, 1, tokenizer)[1] == first
    own = ChatDataset(path, tokenizers[kind], aligned_labels=False)
    row = own[0]
    counted = row["labels"] != -100
    assert torch.equal(row["labels"][counted], row["input_ids"][counted])
    assert tokenizer.decode(row["labels"][counted]) == learnt(data, 0, tokenizer)[1]
    short = ChatDataset(path, tokenizers[kind], padding="do_not_pad")
    assert len(short[1]["input_ids"]) < len(short[0]["input_ids"]) <= short.seq_len


def test_nothing_is_without_labels_and_unsaid(tmp_path: Path) -> None:
    rows = [{"q": "q" * length, "a": "a" * 5} for length in (2, 8, 9, 20)]
    path = write(tmp_path, "a.jsonl", rows)
    mapping = {"question": "q", "answer": "a"}
    for aligned, last in ((True, 2), (False, 1)):
        data = ColumnMappedTextInstructionDataset(path, mapping, seq_length=9, aligned_labels=aligned)
        taught = [int((row["labels"] != -100).sum()) for row in (data[index] for index in range(len(data)))]
        assert taught == ([5, 1] if aligned else [5])[: len(data)] and len(data) == last
        assert data.notes == [
            "3 of 4 rows are longer than 9 tokens; their end is cut off",
            f"{4 - last} of 4 rows are dropped: nothing to train on within 9 tokens",
        ]
    assert not ColumnMappedTextInstructionDataset(path, mapping).notes


def test_what_cannot_be_learnt_from(tmp_path: Path, tokenizers: dict[str, str]) -> None:
    path, turns = write(tmp_path, "a.jsonl", ROWS), tokenizers["turns"]
    columns, chat = ColumnMappedTextInstructionDataset, ChatDataset
    talk = lambda *messages: write(tmp_path, "t.jsonl", [{"messages": list(messages)}])  # noqa: E731
    cases: list[tuple[Any, list[Any], dict[str, Any], str]] = [
        (columns, [path, {"question": "ask"}], {}, "column_mapping has question; expected answer, and question or context"),
        (columns, [path, {"qestion": "ask", "answer": "say"}], {}, "did you mean question"),
        (columns, [path, {"question": "asks", "answer": "say"}], {}, "line 1 of .* has no column 'asks'"),
        (columns, [path, MAPPING], {"seq_length": 4}, "no row of .* has anything to train on within seq_length=4"),
        (columns, [path, MAPPING], {"seq_length": 4, "truncation": False}, "2 of 2 rows of .* have more than seq_length=4"),
        (columns, [path, MAPPING], {"padding": "longest"}, "padding='longest': "),
        (columns, [path, MAPPING, tokenizers["none"]], {"use_hf_chat_template": True}, "has no chat template"),
        (
            columns,
            [path, MAPPING],
            {"split": "validation"},
            "is a file, which has only the split 'train'; got 'validation'",
        ),
        (columns, ["nowhere.jsonl", MAPPING], {}, "there is no file or folder 'nowhere.jsonl'"),
        (chat, [talk(*TALK), tokenizers["none"]], {}, "has no chat template; give one"),
        (chat, [talk(*TALK), tokenizers["last"]], {}, "line 1 of .* renders message 2 differently"),
        (chat, [talk(*TALK), turns], {"chat_template": "nowhere.jinja"}, "neither a template nor a readable file"),
        (
            chat,
            [talk(*TALK), turns],
            {"chat_template": "{{ nothing.at.all }}"},
            "line 1 of .*template of .* fails: Undefined",
        ),
        (chat, [write(tmp_path, "r.jsonl", [{"messages": [{"role": "bot"}]}]), turns], {}, "role of a message is 'bot'"),
        (chat, [write(tmp_path, "m.jsonl", [{"messages": "hello"}]), turns], {}, "line 1 of .*'hello' is not valid JSON"),
        (chat, [path, turns], {}, "has no column 'messages'"),
    ]
    for cls, given, options, expected in cases:
        with pytest.raises(DataError, match=expected):
            cls(*given, **options)
