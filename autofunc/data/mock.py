"""Random tokens: rows of any size to try a run with, without any files."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.checks import check_at_least_one, check_length


class MockDataset(Dataset[dict[str, Tensor]]):
    """Rows of {"input_ids", "labels"}, int64 of shape (seq_len,), with ids drawn uniformly.

    A row depends only on (seed, its index).

    Args:
        vocab_size: ids are below it.
        seq_len: tokens per row.
        num_samples: number of rows.
        seed: of the draws.
        min_seq_len: draw each row's length uniformly from min_seq_len to seq_len; None makes all rows seq_len long.
        aligned_labels: False gives `labels[t] = input_ids[t]`, for models that shift labels themselves.

    Raises:
        DataError: for numbers below 1.
    """

    def __init__(
        self,
        vocab_size: int = 1024,
        seq_len: int = 1024,
        num_samples: int = 1024,
        seed: int = 0,
        min_seq_len: int | None = None,
        aligned_labels: bool = True,
    ) -> None:
        check_length("MockDataset", seq_len)
        check_at_least_one(
            "MockDataset", vocab_size=vocab_size, num_samples=num_samples, seed=seed + 1, min_seq_len=min_seq_len
        )
        check_at_least_one("MockDataset", **{"seq_len - min_seq_len + 1": seq_len - (min_seq_len or seq_len) + 1})
        self.vocab_size, self.seq_len, self.num_samples, self.seed = vocab_size, seq_len, num_samples, seed
        self.aligned_labels, self._least = aligned_labels, min_seq_len or seq_len

    def __repr__(self) -> str:
        length = f"{self.seq_len}" if self._least == self.seq_len else f"{self._least} to {self.seq_len}"
        return f"random tokens below {self.vocab_size:,}, {self.num_samples:,} rows of {length} (seed {self.seed})"

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        draws = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        length = int(draws.integers(self._least, self.seq_len + 1))
        tokens = torch.from_numpy(draws.integers(0, self.vocab_size, length + 1))
        return {"input_ids": tokens[:-1], "labels": tokens[1:] if self.aligned_labels else tokens[:-1]}
