"""HellaSwag: learn to continue a context with its right ending.

Source: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", ACL 2019; hub name `rowan/hellaswag`.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.checks import check_at_least_one, check_length
from autofunc.data.folder import tables_in
from autofunc.data.table_file import SUFFIXES, Located, check_columns, read_table
from autofunc.data.tokenizer import load_tokenizer
from autofunc.errors import DataError, in_brief
from autofunc.foreign_file import NOT_THERE, is_folder, unfit
from autofunc.hub_access import cache_without_network
from autofunc.shown import quoted, shown

_COLUMNS = ("ctx", "endings", "label")
_ROUND_UP_TO = 8


class HellaSwag(Dataset[dict[str, Tensor]]):
    """Rows of context and right ending; only the ending is learnt.

    A row is {"input_ids", "labels"}, int64 of shape (seq_len,). `labels[t]` is the token after `input_ids[t]` where that is
    part of the ending, and -100 elsewhere; rows are padded on the right with token 0.

    Args:
        path_or_dataset: a hub name such as "rowan/hellaswag"; a file (.jsonl, .json, .csv, .parquet) with the columns ctx,
            endings and label; or a folder of such files, named after their splits.
        tokenizer: a name or folder for `transformers`; None takes bytes.
        split: of the dataset; a single file has "train" only.
        num_samples_limit: take the first examples only.
        seq_len: tokens in a row; None takes the longest example, rounded up to a multiple of 8. Longer examples lose the
            beginning of their context.
        aligned_labels: False gives `labels[t] = input_ids[t]` of the ending, for models that shift labels themselves.

    Raises:
        DataError: when the dataset cannot be loaded, is empty or has other columns.
    """

    def __init__(
        self,
        path_or_dataset: str,
        tokenizer: str | None = None,
        split: str = "train",
        num_samples_limit: int | None = None,
        seq_len: int | None = None,
        aligned_labels: bool = True,
    ) -> None:
        check_length("HellaSwag", seq_len)
        check_at_least_one("HellaSwag", num_samples_limit=num_samples_limit)
        self.path_or_dataset, self.aligned_labels = path_or_dataset, aligned_labels
        self.tokenizer = load_tokenizer(tokenizer)
        rows = itertools.islice(_rows(path_or_dataset, split), num_samples_limit)
        self._examples = [self._encode(where, example) for where, example in rows]
        if not self._examples:
            raise DataError(f"HellaSwag: split {quoted(split)} of {shown(path_or_dataset)} is empty")
        longest = max(len(tokens) for tokens, _ in self._examples) - 1
        self.seq_len = seq_len if seq_len is not None else -(-longest // _ROUND_UP_TO) * _ROUND_UP_TO

    def __repr__(self) -> str:
        return f"{shown(self.path_or_dataset)}, {len(self):,} rows of {self.seq_len} tokens ({shown(self.tokenizer.name)})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, context_length = self._examples[index]
        cut = max(len(tokens) - 1 - self.seq_len, 0)
        tokens, context_length = tokens[cut:], max(context_length - cut, 0)
        input_ids = torch.zeros(self.seq_len, dtype=torch.int64)
        labels = torch.full((self.seq_len,), -100, dtype=torch.int64)
        length = len(tokens) - 1
        input_ids[:length] = torch.tensor(tokens[:-1])
        ahead = 1 if self.aligned_labels else 0
        first = max(context_length - ahead, 0)
        labels[first:length] = torch.tensor(tokens[first + ahead : length + ahead])
        return {"input_ids": input_ids, "labels": labels}

    def _encode(self, where: str, example: Mapping[str, Any]) -> tuple[list[int], int]:
        """Tokens of context and ending together, and how many belong to the context."""
        endings = _endings(where, example["endings"])
        given, count = example["label"], len(endings)
        label = given if type(given) is int else int(given) if isinstance(given, str) and _NUMBER.fullmatch(given) else -1
        if not 0 <= label < count:  # the hub's test split has no labels
            raise DataError(f"HellaSwag: {where}: label {quoted(given)} with {count} endings")
        context = list(self.tokenizer.encode(_text(where, "ctx", example["ctx"])))
        return context + list(self.tokenizer.encode(_text(where, "the ending", " " + endings[label]))), len(context)


_NUMBER = re.compile("[0-9]{1,9}")


def _text(where: str, what: str, value: object) -> str:
    try:
        if isinstance(value, str) and value.encode(errors="surrogateescape") is not None:
            return value
    except UnicodeEncodeError:  # half a character, which JSON can say
        pass
    raise DataError(f"HellaSwag: {where}: {what} is {quoted(value)}; expected a text")


def _endings(where: str, given: object) -> list[str]:
    """The endings of an example; in a CSV file they are a text that holds a list."""
    endings = given
    if isinstance(endings, str):
        for read in (json.loads, ast.literal_eval):  # neither executes anything
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                endings = read(endings)
                break
    if not isinstance(endings, list) or not endings or not all(isinstance(each, str) for each in endings):
        raise DataError(
            f"HellaSwag: {where}: endings {quoted(given)}; expected a list of texts, in a CSV file as JSON: "
            '["one", "another"]'
        )
    return endings


def _rows(path_or_dataset: str, split: str) -> Iterator[Located]:
    """The rows of a split, each with where it is."""
    path = Path(path_or_dataset).expanduser()
    is_local = unfit(path) != NOT_THERE or path.suffix in SUFFIXES or path_or_dataset.startswith((".", "/", "~"))
    try:
        if not is_local:
            yield from _of_hub(path_or_dataset, split)
        elif unfit(path) == NOT_THERE:
            raise DataError(f"there is no file or folder {quoted(path_or_dataset)} (looked in {shown(Path.cwd())})")
        elif not is_folder(path):
            yield from read_table(path, _COLUMNS)
        else:
            for file in tables_in(path, split):
                yield from read_table(file, _COLUMNS)
    except DataError as error:
        raise DataError(f"HellaSwag: {error}") from error


def _of_hub(name: str, split: str) -> Iterator[Located]:
    import datasets  # takes seconds to import

    datasets.disable_progress_bars()
    with cache_without_network() as network:
        try:
            table = datasets.load_dataset(name, split=split)
        except Exception as error:  # datasets raises a different one for each cause
            said = in_brief(error)
            raise DataError(f"{quoted(name)}, split {quoted(split)}, cannot be loaded{network}: {said}") from error
    check_columns(shown(name), table.column_names, _COLUMNS)
    for number, row in enumerate(table, 1):
        yield f"row {number} of {shown(name)}", row
