"""Placeholder token ids: rows for planning on a machine that lacks the data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.checks import check_at_least_one, check_length


class MadeUpTokens(Dataset[dict[str, Tensor]]):
    """Rows of {"input_ids", "labels"}, int64 of shape (seq_len,), both equal.

    Args:
        vocab_size: ids are below it.
        seq_len: tokens per row.
        num_rows: number of rows.

    Raises:
        DataError: for numbers below 1.
    """

    aligned_labels = False

    def __init__(self, vocab_size: int, seq_len: int, num_rows: int) -> None:
        check_length("MadeUpTokens", seq_len)
        check_at_least_one("MadeUpTokens", vocab_size=vocab_size, num_rows=num_rows)
        self.vocab_size, self.seq_len, self.num_rows = vocab_size, seq_len, num_rows

    def __repr__(self) -> str:
        return f"made up, {self.num_rows:,} rows of {self.seq_len} tokens below {self.vocab_size}"

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(self.seq_len) + index) % self.vocab_size
        return {"input_ids": ids, "labels": ids.clone()}
