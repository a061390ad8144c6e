"""HellaSwag: learn to continue a context with its right ending.

Source: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", ACL 2019; hub name `rowan/hellaswag`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.checks import check_at_least_one, check_length
from autofunc.data.tokenizer import load_tokenizer
from autofunc.errors import DataError

_COLUMNS = ("ctx", "endings", "label")
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
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
        table = _load(path_or_dataset, split)
        missing = [column for column in _COLUMNS if column not in table.column_names]
        if missing:
            raise DataError(
                f"HellaSwag: {path_or_dataset} has no column {missing[0]!r}; found {', '.join(table.column_names)}, "
                f"expected {', '.join(_COLUMNS)}"
            )
        if num_samples_limit is not None:
            table = table.select(range(min(num_samples_limit, len(table))))
        if not len(table):
            raise DataError(f"HellaSwag: split {split!r} of {path_or_dataset} is empty")
        self._examples = [self._encode(example) for example in table]
        longest = max(len(tokens) for tokens, _ in self._examples) - 1
        self.seq_len = seq_len if seq_len is not None else -(-longest // _ROUND_UP_TO) * _ROUND_UP_TO

    def __repr__(self) -> str:
        return f"{self.path_or_dataset}, {len(self):,} rows of {self.seq_len} tokens ({self.tokenizer.name})"

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

    def _encode(self, example: dict[str, Any]) -> tuple[list[int], int]:
        """Tokens of context and ending together, and how many belong to the context."""
        endings = _endings(example)
        given, count = str(example["label"]), len(endings)
        if not (given.isdigit() and int(given) < count):  # the hub's test split has no labels
            raise DataError(f"HellaSwag: label {given!r} with {count} endings, at {example['ctx'][:60]!r}")
        label = int(given)
        context = list(self.tokenizer.encode(example["ctx"]))
        return context + list(self.tokenizer.encode(" " + endings[label])), len(context)


def _endings(example: Mapping[str, Any]) -> list[str]:
    """The endings of an example; in a CSV file they are a text that holds a list."""
    endings = example["endings"]
    if isinstance(endings, str):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError):
                endings = read(endings)
                break
    if not isinstance(endings, list) or not endings or not all(isinstance(each, str) for each in endings):
        raise DataError(
            f"HellaSwag: endings {str(endings)[:60]!r}, at {str(example['ctx'])[:60]!r}; expected a list of texts, in a "
            'CSV file as JSON: ["one", "another"]'
        )
    return endings


def _load(path_or_dataset: str, split: str) -> Any:
    import datasets  # takes seconds to import

    path = Path(path_or_dataset).expanduser()
    is_local = path.exists() or path.suffix in _FORMATS or path_or_dataset.startswith((".", "/", "~"))
    if is_local and not path.exists():
        raise DataError(f"HellaSwag: there is no file or folder {path_or_dataset!r} (looked in {Path.cwd()})")
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise DataError(f"HellaSwag: {path} is {path.suffix or 'without a suffix'}; expected {', '.join(_FORMATS)}")
            return datasets.load_dataset(_FORMATS[path.suffix], data_files={split: str(path)}, split=split)
        return datasets.load_dataset(str(path) if is_local else path_or_dataset, split=split)
    except DataError:
        raise
    except Exception as error:  # datasets raises a different one for each cause
        raise DataError(
            f"HellaSwag: {path_or_dataset!r}, split {split!r}, cannot be loaded: {type(error).__name__}: {error}"
        ) from error
