"""HellaSwag: train on continuing a context with its right ending.

Source: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", ACL 2019; hub name `rowan/hellaswag`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.checks import check_at_least_one, check_length
from autofunc.data.learnt_tokens import ROUND_UP_TO, Example, examples_of, row_of
from autofunc.data.tables import Tables, text_of
from autofunc.data.tokenizer import load_tokenizer
from autofunc.errors import DataError
from autofunc.shown import quoted, shown

_COLUMNS = ("ctx", "endings", "label")
_VERSION = 1  # of the tokenisation; part of the cache key


class HellaSwag(Dataset[dict[str, Tensor]]):
    """Rows of context and right ending; the loss covers only the ending.

    A row is {"input_ids", "labels"}, int64 of shape (seq_len,). `labels[t]` is the token after `input_ids[t]` if that is
    part of the ending, and -100 elsewhere; rows are padded on the right with token 0.

    Args:
        path_or_dataset: a hub name such as "rowan/hellaswag"; a file (.jsonl, .json, .csv, .parquet) with the columns ctx,
            endings and label; or a folder of such files, named after their splits.
        tokenizer: a name or folder for `transformers`; None takes bytes.
        split: of the dataset; a single file has only "train".
        num_samples_limit: take only the first examples.
        seq_len: tokens per row; None takes the longest example, rounded up to a multiple of 8. Longer examples lose the
            beginning of their context.
        aligned_labels: False gives `labels[t] = input_ids[t]` of the ending, for models that shift labels themselves.

    Raises:
        DataError: if the dataset cannot be loaded, is empty or lacks one of these columns.
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

        def make() -> Iterator[Example]:
            for where, row in tables.rows(_COLUMNS):
                yield self._encode(where, row)

        try:
            tables = Tables(path_or_dataset, split, limit=num_samples_limit)
            key = {"made by": f"HellaSwag {_VERSION}", **tables.key()}
            self._examples = examples_of("hellaswag", str(tables), key, self.tokenizer, make)
        except DataError as error:
            raise DataError(f"HellaSwag: {error}") from error
        if not len(self._examples):
            raise DataError(f"HellaSwag: split {quoted(split)} of {shown(path_or_dataset)} is empty")
        longest = int(self._examples.lengths.max()) - 1
        self.seq_len = seq_len if seq_len is not None else -(-longest // ROUND_UP_TO) * ROUND_UP_TO

    def __repr__(self) -> str:
        return f"{shown(self.path_or_dataset)}, {len(self):,} rows of {self.seq_len} tokens ({shown(self.tokenizer.name)})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, learnt = self._examples.at(index)
        cut = max(len(tokens) - 1 - self.seq_len, 0)
        return row_of(tokens[cut:], learnt[cut:], self.seq_len, self.aligned_labels)

    def _encode(self, where: str, example: Mapping[str, Any]) -> Example:
        """Tokenise context and ending together; the loss covers the ending."""
        endings = _endings(where, example["endings"])
        given, count = example["label"], len(endings)
        label = given if type(given) is int else int(given) if isinstance(given, str) and _NUMBER.fullmatch(given) else -1
        if not 0 <= label < count:  # the hub's test split has no labels
            raise DataError(f"{where}: label {quoted(given)} with {count} endings")
        context = list(self.tokenizer.encode(text_of(where, "ctx", example["ctx"])))
        ending = list(self.tokenizer.encode(text_of(where, "the ending", " " + endings[label])))
        return Example(context + ending, [False] * len(context) + [True] * len(ending))


_NUMBER = re.compile("[0-9]{1,9}")


def _endings(where: str, given: object) -> list[str]:
    """Return the endings of an example; a CSV file holds the list as text."""
    endings = given
    if isinstance(endings, str):
        for read in (json.loads, ast.literal_eval):  # neither executes anything
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                endings = read(endings)
                break
    if not isinstance(endings, list) or not endings or not all(isinstance(each, str) for each in endings):
        raise DataError(
            f'{where}: endings {quoted(given)}; expected a list of strings, in a CSV file as JSON: ["one", "another"]'
        )
    return endings
