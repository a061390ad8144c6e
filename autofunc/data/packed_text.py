"""Documents packed into rows of one length, for language modelling; documents do not see each other."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.array_cache import cached
from autofunc.data.checks import check_at_least_one, check_length
from autofunc.data.documents import Documents, tokens_of
from autofunc.data.packing import packed
from autofunc.data.tokenizer import load_tokenizer
from autofunc.errors import DataError
from autofunc.losses import IGNORED
from autofunc.shown import shown


class PackedText(Dataset[dict[str, Tensor]]):
    """Rows of {"input_ids", "labels", "position_ids"}, int64 of shape (seq_len,), with several documents each.

    Positions restart at 0 with every document, which tells a model where documents begin: models of `transformers` then
    keep documents from seeing each other, and a run refuses a model that doesn't. The last token of a document has no
    label. Documents longer than a row are split. The rest of a row is padded with token 0 and no labels.

    Args:
        path: a file, several, or a folder. In .jsonl, .json, .csv and .parquet files each row is a document; any other
            file is one document.
        seq_len: tokens per row.
        tokenizer: a name or folder for `transformers`; its end-of-text token ends each document. None takes bytes.
        text_column: of files with rows.
        suffixes: which files of a folder, such as [".txt"]; None takes all.
        num_samples_limit: take only the first rows.
        aligned_labels: False gives `labels[t] = input_ids[t]`, for models that shift labels themselves; then the first
            token of a document has no label.

    Raises:
        DataError: if a file is missing, or no document has two tokens.
    """

    is_packed = True

    def __init__(
        self,
        path: str | list[str],
        seq_len: int,
        tokenizer: str | None = None,
        text_column: str = "text",
        suffixes: list[str] | None = None,
        num_samples_limit: int | None = None,
        aligned_labels: bool = True,
    ) -> None:
        check_length("PackedText", seq_len)
        check_at_least_one("PackedText", num_samples_limit=num_samples_limit, **{"seq_len - 1": seq_len - 1})
        self.seq_len, self.aligned_labels = seq_len, aligned_labels
        self.tokenizer = load_tokenizer(tokenizer)
        try:
            documents = Documents(path, text_column, suffixes)
            made = tokens_of(documents, self.tokenizer)
            pack = partial(packed, made.starts, seq_len)
            found = cached("packing", {**made.key, "seq_len": seq_len}, pack) if made.key else pack()
        except DataError as error:
            raise DataError(f"PackedText: {error}") from error
        self._tokens, self._begins, self._lengths = made.tokens, found["begins"], found["lengths"]
        self._rows = found["rows"] if num_samples_limit is None else found["rows"][: num_samples_limit + 1]
        self._of, self._num_documents = str(documents), len(made.starts) - 1
        if len(self) < 1:
            raise DataError(f"PackedText: {shown(path)} has no document of two tokens or more")

    def __repr__(self) -> str:
        pieces = self._lengths[: int(self._rows[-1])]
        return (
            f"{self._of}, {self._num_documents:,} documents, {len(self):,} rows of {self.seq_len} tokens "
            f"({shown(self.tokenizer.name)}), {int(pieces.sum()) / (len(self) * self.seq_len):.1%} full"
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids, position_ids = np.zeros(self.seq_len, np.int64), np.zeros(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORED, np.int64)
        at = 0
        for piece in range(int(self._rows[index]), int(self._rows[index + 1])):
            begin, length = int(self._begins[piece]), int(self._lengths[piece])
            tokens, end = self._tokens[begin : begin + length], at + length
            input_ids[at:end], position_ids[at:end] = tokens, np.arange(length)
            if self.aligned_labels:
                labels[at : end - 1] = tokens[1:]
            else:
                labels[at + 1 : end] = tokens[1:]
            at = end
        position_ids[at:] = np.arange(self.seq_len - at)  # the padding counts as one more document
        return {
            "input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }  # fmt: skip
