"""Conversations: train on what the assistant says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autofunc.data.checks import check_at_least_one
from autofunc.data.conversations import conversation, messages_of
from autofunc.data.instruction_rows import InstructionRows, PaddingMode
from autofunc.data.learnt_tokens import Example, examples_of
from autofunc.data.tables import Tables
from autofunc.data.tokenizer import HuggingFaceTokenizer
from autofunc.errors import DataError
from autofunc.shown import quoted

_VERSION = 1  # of the tokenisation; part of the cache key


class ChatDataset(InstructionRows):
    """Rows of conversations: a column `messages` of {role, content} each, and an optional column `tools`.

    A row is {"input_ids", "labels"}, int64 of shape (seq_length,). The loss covers the assistant's answers and the
    template's end-of-message tokens; labels are -100 elsewhere.

    Args:
        path_or_dataset_id: a file (.jsonl, .json, .csv, .parquet), several, a folder of such files, or a hub name.
        tokenizer: a name or folder for `transformers`, with a chat template.
        split: of a folder or a hub dataset.
        name: the subset of a hub dataset.
        answer_only_loss_mask: False trains on all tokens.
        seq_length: tokens per row; None takes the longest conversation, rounded up to a multiple of 8.
        padding: `do_not_pad` gives rows of different lengths, for `dataloader.pad_seq_len_divisible` or `pad_seq_len_to`.
        truncation: True cuts the end off longer conversations; rows left with nothing to train on are dropped and
            counted.
        chat_template: Jinja, or a file with it; replaces the tokenizer's own.
        limit_dataset_samples: take only the first rows.
        aligned_labels: False gives `labels[t] = input_ids[t]`, for models that shift labels themselves.

    Raises:
        DataError: if rows cannot be read or rendered, or none has anything to train on.
    """

    def __init__(
        self,
        path_or_dataset_id: str | list[str],
        tokenizer: str,
        split: str = "train",
        name: str | None = None,
        answer_only_loss_mask: bool = True,
        seq_length: int | None = None,
        padding: PaddingMode = "max_length",
        truncation: bool = True,
        chat_template: str | None = None,
        limit_dataset_samples: int | None = None,
        aligned_labels: bool = True,
    ) -> None:
        check_at_least_one("ChatDataset", limit_dataset_samples=limit_dataset_samples)
        try:
            tables = Tables(path_or_dataset_id, split, name, limit=limit_dataset_samples)
            made_by = HuggingFaceTokenizer(tokenizer, template_of(chat_template))
            if made_by.chat_template is None:
                raise DataError(
                    f"tokenizer {quoted(tokenizer)} has no chat template; give one: chat_template: path/to/file.jinja"
                )

            def make() -> Iterator[Example]:
                for where, row in tables.rows(["messages"]):
                    messages, tools = (_parsed(where, row.get(column)) for column in ("messages", "tools"))
                    yield conversation(where, messages_of(where, messages), made_by, tools or None, answer_only_loss_mask)

            key = {"made by": f"chat {_VERSION}", **tables.key(), "answers": answer_only_loss_mask}
            examples = examples_of("chat", str(tables), key, made_by, make)
        except DataError as error:
            raise DataError(f"ChatDataset: {error}") from error
        super().__init__(
            examples, made_by, str(tables), seq_length=seq_length, padding=padding, truncation=truncation,
            aligned_labels=aligned_labels,
        )  # fmt: skip


def template_of(given: str | None) -> str | None:
    """Return a chat template: the text given, or the content of the file it names.

    Raises:
        DataError: if the text is neither.
    """
    if given is None or "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template: {quoted(given)} is neither a template nor a readable file: {error}") from error


def _parsed(where: str, value: Any) -> Any:
    """Return a list; a CSV file holds it as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {quoted(value)} is not valid JSON; expected a list of messages") from error
