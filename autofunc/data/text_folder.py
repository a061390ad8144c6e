"""A corpus from a folder of text files, cut into rows of equal length for language modelling."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.array_cache import Arrays, cached, content_of
from autofunc.data.checks import check_at_least_one
from autofunc.data.folder import files_in
from autofunc.data.tokenizer import load_tokenizer
from autofunc.errors import DataError, one_of
from autofunc.foreign_file import NOT_THERE, check_file, compression, is_folder, unfit
from autofunc.progress_bar import counting
from autofunc.shown import shown

_VERSION = 1  # of the tokenisation; part of the cache key
_VALIDATION_EVERY = 20  # every 20th file is for validation

MOST_CORPUS_BYTES = 2**33
"""The most bytes of all files together: their tokens are kept in memory."""


class TextFolder(Dataset[dict[str, Tensor]]):
    """All text of a folder, joined file after file and cut into rows of `seq_len` tokens.

    A row is {"input_ids", "labels"}, int64 of shape (seq_len,); `labels[t]` is the token after `input_ids[t]`.
    Files are sorted by path. Every 20th file is for validation (of fewer than 20 files, the last twentieth of the text).

    Args:
        path: a folder or one file; None takes the source of Python's standard library: real text on every machine.
        split: "train" or "validation".
        seq_len: tokens per row.
        tokenizer: a name or folder for `transformers`; None takes bytes.
        suffixes: which files, such as [".txt", ".md"]; None takes all (of the standard library, [".py"]). Files with zero
            bytes and compressed files are not text and are skipped; a compressed file is refused if `suffixes` selects
            it.
        num_samples_limit: take only this many rows, evenly spaced.
        aligned_labels: False gives `labels[t] = input_ids[t]`, for models that shift labels themselves.

    Raises:
        DataError: if the folder is missing, has too little text, or contains something that isn't an ordinary file of its
            own: a FIFO, or a link that dangles or leads out of it.
    """

    def __init__(
        self,
        path: str | None = None,
        split: str = "train",
        seq_len: int = 128,
        tokenizer: str | None = None,
        suffixes: Sequence[str] | None = None,
        num_samples_limit: int | None = None,
        aligned_labels: bool = True,
    ) -> None:
        if split not in ("train", "validation"):
            raise DataError(f"TextFolder: split={split!r}: {one_of(split, ['train', 'validation'])}")
        for name, given in (("path", path), ("suffixes", suffixes)):
            if given is not None and not given:
                raise DataError(f"TextFolder: {name}={given!r} is empty; leave it out, or name some")
        check_at_least_one("TextFolder", seq_len=seq_len, num_samples_limit=num_samples_limit)
        self.seq_len, self.aligned_labels = seq_len, aligned_labels
        self.path = Path(path).expanduser() if path is not None else Path(sysconfig.get_paths()["stdlib"])
        self.tokenizer = load_tokenizer(tokenizer)
        try:
            files = _files(self.path, [".py"] if path is None and suffixes is None else suffixes)
        except DataError as error:
            raise DataError(f"TextFolder: {error}") from error
        split_by_file = len(files) >= _VALIDATION_EVERY
        if split_by_file:
            wanted = split == "validation"
            files = [f for index, f in enumerate(files) if (index % _VALIDATION_EVERY == _VALIDATION_EVERY - 1) == wanted]
        self._tokens, self.num_files = self._read(files, suffixes)
        if not split_by_file:
            cut = len(self._tokens) - len(self._tokens) // _VALIDATION_EVERY
            self._tokens = self._tokens[:cut] if split == "train" else self._tokens[cut:]
        rows = (len(self._tokens) - 1) // seq_len
        if rows < 1:
            raise DataError(
                f"TextFolder: {shown(self.path)} has {len(self._tokens)} tokens for {split}, too few for one row of "
                f"seq_len={seq_len}; name a folder with more text, or a shorter seq_len"
            )
        taken = rows if num_samples_limit is None else min(rows, num_samples_limit)
        self._starts = np.linspace(0, rows, taken, endpoint=False).astype(np.int64) * seq_len

    def __repr__(self) -> str:
        files = f"{self.num_files:,} {'file' if self.num_files == 1 else 'files'}"
        return (
            f"{shown(self.path)} ({files}), {len(self._tokens):,} tokens ({shown(self.tokenizer.name)}), "
            f"{len(self):,} rows of {self.seq_len}"
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self._starts[index]
        row = torch.from_numpy(self._tokens[start : start + self.seq_len + 1].astype(np.int64))
        return {"input_ids": row[:-1], "labels": row[1:] if self.aligned_labels else row[:-1]}

    def _read(self, files: list[Path], suffixes: Sequence[str] | None) -> tuple[np.ndarray, int]:
        """Return (tokens of all files, number of files with text); real tokenizers go through the cache."""
        of_folder, chosen = is_folder(self.path), suffixes is not None

        def make() -> dict[str, np.ndarray]:
            with counting(f"tokenising {shown(self.path)}", "bytes", sum(file.stat().st_size for file in files)) as advance:
                chunks = list(self._tokens_of(files, of_folder, chosen, advance))
            tokens = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int32)
            return {"tokens": tokens, "num_files": np.array(len(chunks))}

        if self.tokenizer.name == "bytes" or self.tokenizer.identity is None:
            found: Arrays = make()
        else:
            for file in files:
                check_file(file, DataError, MOST_CORPUS_BYTES)
            key = {"made by": f"text {_VERSION}", "content": content_of(files), "tokenizer": self.tokenizer.identity}
            found = cached("text", {**key, "of a folder": of_folder, "chosen": chosen}, make)
        return found["tokens"], int(found["num_files"])

    def _tokens_of(
        self, files: list[Path], of_folder: bool, chosen: bool, advance: Callable[[int], None]
    ) -> Iterator[np.ndarray]:
        room = MOST_CORPUS_BYTES
        for file in files:
            check_file(file, DataError, room)
            content = file.read_bytes()
            room -= len(content)
            advance(len(content))
            packed = compression(file)
            if packed is not None and (chosen or not of_folder):
                raise DataError(f"TextFolder: {shown(file)} is compressed ({packed}); unpack it first")
            if b"\0" in content and not of_folder:
                raise DataError(f"TextFolder: {shown(file)} has zero bytes in it, so it is not text")
            if b"\0" in content or packed is not None:
                continue
            if self.tokenizer.name == "bytes":
                yield np.frombuffer(content, dtype=np.uint8)
            else:
                yield np.asarray(self.tokenizer.encode(content.decode("utf-8", errors="replace")), dtype=np.int32)


def _files(path: Path, suffixes: Sequence[str] | None) -> list[Path]:
    """Return the files of a folder that have one of the suffixes, sorted by path; or the one file."""
    if is_folder(path):
        return sorted(files_in(path, suffixes))
    if unfit(path) == NOT_THERE:
        raise DataError(f"{shown(path)} is neither a folder nor a file")
    check_file(path, DataError, MOST_CORPUS_BYTES)
    return [path]
