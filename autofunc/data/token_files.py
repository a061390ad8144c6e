"""Rows of memory-mapped token files: any number of tokens, and no start-up time."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.checks import check_at_least_one, check_length
from autofunc.data.token_file import TokenFile, read_token_file
from autofunc.errors import DataError
from autofunc.shown import quoted, shown


class TokenFiles(Dataset[dict[str, Tensor]]):
    """Rows of {"input_ids", "labels"}, int64 of shape (seq_len,): consecutive in each file, files by name.

    The end of a file is dropped if it is shorter than a row and the token after it. The loader decides the order in which
    rows are read, as a function of (seed, epoch).

    Args:
        file_pattern: a file, several, or a pattern such as "tokens/train_*.bin"; see `autofunc.data.write_token_file`.
        seq_len: tokens per row.
        bos_token: the id that begins a document.
        align_to_bos: begin each row with `bos_token`; tokens between a row's end and the next `bos_token` are dropped.
        vocab_size: token ids are below it; by default taken from the files.
        raw_dtype: of files without a header, such as nanoGPT's train.bin: `uint16` or `uint32`.
        num_samples_limit: take only the first rows.
        aligned_labels: False gives `labels[t] = input_ids[t]`, for models that shift labels themselves.

    Raises:
        DataError: naming a file that is missing, damaged or not a token file; or if the files hold no row.
    """

    def __init__(
        self,
        file_pattern: str | list[str],
        seq_len: int,
        bos_token: int | None = None,
        align_to_bos: bool = False,
        vocab_size: int | None = None,
        raw_dtype: Literal["uint16", "uint32"] | None = None,
        num_samples_limit: int | None = None,
        aligned_labels: bool = True,
    ) -> None:
        check_length("TokenFiles", seq_len)
        check_at_least_one("TokenFiles", num_samples_limit=num_samples_limit, vocab_size=vocab_size)
        if align_to_bos and bos_token is None:
            raise DataError("TokenFiles: align_to_bos needs bos_token, the id that begins a document")
        self.seq_len, self.aligned_labels = seq_len, aligned_labels
        try:
            self._paths = _paths(file_pattern)
            self._files = [read_token_file(path, raw_dtype) for path in self._paths]
        except DataError as error:
            raise DataError(f"TokenFiles: {error}") from error
        sizes = [file.vocab_size for file in self._files]
        self.vocab_size = vocab_size or (None if None in sizes else max(size or 0 for size in sizes))
        self._starts = [_starts(file, seq_len, bos_token if align_to_bos else None) for file in self._files]
        self._ends = np.cumsum([len(starts) for starts in self._starts])
        self._length = min(int(self._ends[-1]), num_samples_limit or int(self._ends[-1]))
        if not self._length:
            raise DataError(
                f"TokenFiles: {shown(file_pattern)} has no row of seq_len={seq_len} and a token after it"
                + (f" that begins with bos_token={bos_token}" if align_to_bos else "")
            )

    def __repr__(self) -> str:
        files = shown(self._paths[0]) if len(self._paths) == 1 else f"{len(self._paths):,} files"
        tokens = sum(len(file.tokens) for file in self._files)
        return f"{files}, {tokens:,} tokens, {len(self):,} rows of {self.seq_len}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        starts = self._starts[number]
        start = int(starts[index - int(self._ends[number]) + len(starts)])
        row = self._files[number].tokens[start : start + self.seq_len + 1].astype(np.int64)
        if self.vocab_size is not None and row.max() >= self.vocab_size:
            raise DataError(
                f"{shown(self._paths[number])} is damaged: token {row.max()} at {start + int(row.argmax()):,}, "
                f"expected ids below {self.vocab_size:,}"
            )
        tokens = torch.from_numpy(row)
        return {"input_ids": tokens[:-1], "labels": tokens[1:] if self.aligned_labels else tokens[:-1]}


def _paths(pattern: str | list[str]) -> list[Path]:
    if not isinstance(pattern, str):
        return [Path(each).expanduser() for each in pattern]
    path = Path(pattern).expanduser()
    if not any(each in pattern for each in "*?["):
        return [path]
    fixed = next(parent for parent in path.parents if not any(each in str(parent) for each in "*?["))
    found = sorted(fixed.glob(str(path.relative_to(fixed))))
    if not found:
        raise DataError(f"no file matches {quoted(pattern)}")
    return found


def _starts(file: TokenFile, seq_len: int, bos: int | None) -> range | np.ndarray:
    """Return where the rows of a file begin."""
    last = len(file.tokens) - seq_len - 1
    if bos is None:
        return range(0, last + 1, seq_len)
    at = np.flatnonzero(file.tokens == bos)
    starts, after = [], 0
    while (number := int(np.searchsorted(at, after))) < len(at) and at[number] <= last:
        starts.append(int(at[number]))
        after = starts[-1] + seq_len
    return np.array(starts, dtype=np.int64)
