"""Token files (.bin): a header of 1,024 bytes, then tokens of 2 or 4 bytes, little-endian, for memory mapping.

The header is 256 int32 numbers: 278895051; the version, 1; the number of tokens; the bytes per token; and the vocabulary
size, or 0. NeMo AutoModel's NanogptDataset reads this format. Files that begin with 20240520, as modded-nanogpt writes
them, are read too: their tokens have 2 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autofunc.errors import DataError
from autofunc.foreign_file import check_file
from autofunc.shown import shown

MOST_TOKENS_PER_FILE = 2**31 - 1
"""The most tokens a header can count."""

_MAGIC, _OLDER_MAGIC, _VERSION = 278895051, 20240520, 1
_HEADER = np.dtype("<i4")
_HEADER_NUMBERS = 256
HEADER_BYTES = _HEADER_NUMBERS * _HEADER.itemsize
_KINDS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_MOST_BYTES = HEADER_BYTES + 4 * MOST_TOKENS_PER_FILE


class TokenFile(NamedTuple):
    """The content of a token file."""

    tokens: np.ndarray  # memory-mapped, uint16 or uint32 of shape (tokens,)
    vocab_size: int | None  # None if the file does not record it


def write_token_file(path: Path, chunks: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write a token file atomically and return its number of tokens.

    Args:
        path: of the file.
        chunks: tokens, as integer arrays of shape (tokens,), one after the other.
        vocab_size: token ids are below it; up to 65,536 a token takes 2 bytes, else 4.

    Raises:
        DataError: for a token id out of range, for too many tokens, or if the file cannot be written.
    """
    kind = _KINDS[2 if vocab_size <= 1 << 16 else 4]
    part = path.with_name(f"{path.name}.partial")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(b"\0" * HEADER_BYTES)
            for chunk in chunks:
                if chunk.size and not 0 <= chunk.min() <= chunk.max() < vocab_size:
                    raise DataError(f"token {chunk.max()} is not below vocab_size={vocab_size}")
                count += len(chunk)
                if count > MOST_TOKENS_PER_FILE:
                    raise DataError(
                        f"a file holds at most {MOST_TOKENS_PER_FILE:,} tokens; write several, each with a part"
                    )
                file.write(chunk.astype(kind).tobytes())
            header = np.zeros(_HEADER_NUMBERS, _HEADER)
            header[:5] = _MAGIC, _VERSION, count, kind.itemsize, vocab_size
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {shown(path)}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return count


def read_token_file(path: Path, raw: str | None = None) -> TokenFile:
    """Map a token file into memory.

    Args:
        path: of the file.
        raw: `uint16` or `uint32` for a file without a header, which holds only tokens.

    Raises:
        DataError: naming a file that is missing, has a different format or is damaged.
    """
    check_file(path, DataError, _MOST_BYTES)
    size = path.stat().st_size
    if raw is not None:
        kind = np.dtype(f"<u{np.dtype(raw).itemsize}")
        if not size or size % kind.itemsize:
            raise DataError(f"{shown(path)} has {size:,} bytes; expected one or more tokens of {kind.itemsize} bytes")
        return TokenFile(np.memmap(path, kind, "r"), None)
    if size < HEADER_BYTES:
        raise DataError(f"{shown(path)} has {size:,} bytes; a token file begins with a header of {HEADER_BYTES:,}")
    magic, version, count, itemsize, vocab_size = np.fromfile(path, _HEADER, 5).tolist()
    if magic not in (_MAGIC, _OLDER_MAGIC):
        raise DataError(
            f"{shown(path)} is not a token file: it begins with {magic}, expected {_MAGIC}; for a file without a header "
            "give the dtype of its tokens: raw_dtype: uint16"
        )
    if magic == _OLDER_MAGIC:
        itemsize, vocab_size = 2, 0
    if version != _VERSION or itemsize not in _KINDS or count < 1:
        raise DataError(
            f"{shown(path)}: the header says version {version}, {count:,} tokens of {itemsize} bytes; expected version "
            f"{_VERSION}, and one or more tokens of 2 or 4 bytes"
        )
    if size != HEADER_BYTES + count * itemsize:
        raise DataError(
            f"{shown(path)} is damaged: the header says {count:,} tokens of {itemsize} bytes, and "
            f"{size - HEADER_BYTES:,} bytes follow it; expected {count * itemsize:,}"
        )
    return TokenFile(np.memmap(path, _KINDS[itemsize], "r", HEADER_BYTES), vocab_size or None)
