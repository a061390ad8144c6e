"""Documents: text files, or table rows with a text column; and their tokens, one document after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autofunc.data.array_cache import Arrays, cached, content_of
from autofunc.data.folder import files_in
from autofunc.data.table_file import SUFFIXES, check_plain, read_table
from autofunc.data.tables import text_of
from autofunc.data.tokenizer import Tokenizer
from autofunc.errors import DataError
from autofunc.foreign_file import NOT_THERE, check_file, compression, is_folder, read_plain, unfit
from autofunc.progress_bar import counting
from autofunc.shown import shown

_VERSION = 1  # of the tokenisation; part of the cache key


class Documents:
    """Texts in order: files by path, rows as stored.

    Args:
        path: a file, several, or a folder. In .jsonl, .json, .csv and .parquet files each row is a document; any other
            file is one document.
        text_column: of the rows.
        suffixes: which files of a folder, such as [".txt"]; None takes all.

    Raises:
        DataError: if a file is missing or unsuitable, or a folder has none.
    """

    def __init__(self, path: str | Sequence[str], text_column: str = "text", suffixes: Sequence[str] | None = None) -> None:
        self._column, self.files = text_column, list[Path]()
        for each in [path] if isinstance(path, str) else path:
            found = Path(each).expanduser()
            if unfit(found) == NOT_THERE:
                raise DataError(f"{shown(found)} is neither a folder nor a file")
            self.files += sorted(files_in(found, suffixes)) if is_folder(found) else [found]
        if not self.files:
            raise DataError(f"{shown(path)} has no files")
        for file in self.files:
            if file.suffix in SUFFIXES:
                check_plain(file)
            else:
                check_file(file, DataError)
                packed = compression(file)
                if packed is not None:
                    raise DataError(f"{shown(file)} is compressed ({packed}); unpack it first")

    def __str__(self) -> str:
        return shown(self.files[0]) if len(self.files) == 1 else f"{len(self.files):,} files"

    def key(self) -> dict[str, Any]:
        """Return what identifies the texts, for a cache key."""
        return {"content": content_of(self.files), "column": self._column}

    def texts(self) -> Iterator[str]:
        """Yield all documents.

        Raises:
            DataError: naming the file and the row that has no text.
        """
        for file in self.files:
            if file.suffix in SUFFIXES:
                for where, row in read_table(file, [self._column]):
                    yield text_of(where, self._column, row[self._column])
            else:
                yield read_plain(file, DataError)

    def tokens(self, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
        """Yield each document's tokens, uint32 of shape (tokens,), plus the tokenizer's end-of-text token if it has one."""
        end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        with counting(f"tokenising {self}", "documents") as advance:
            for text in self.texts():
                yield np.asarray([*tokenizer.encode(text), *end], dtype=np.uint32)
                advance(1)


class DocumentTokens(NamedTuple):
    """Tokens of documents, one after the other."""

    tokens: np.ndarray  # uint32 of shape (tokens,)
    starts: np.ndarray  # of each document, and the end of the last; int64
    key: dict[str, Any]  # everything the tokens depend on; empty if that cannot be known


def tokens_of(documents: Documents, tokenizer: Tokenizer) -> DocumentTokens:
    """Tokenise all documents, or read their tokens from the cache."""

    def make() -> dict[str, np.ndarray]:
        found = list(documents.tokens(tokenizer))
        starts = np.cumsum([0, *map(len, found)], dtype=np.int64)
        return {"tokens": np.concatenate([np.empty(0, np.uint32), *found]), "starts": starts}

    if tokenizer.identity is None:
        arrays: Arrays = make()
        key: dict[str, Any] = {}
    else:
        key = {"made by": f"documents {_VERSION}", "tokenizer": tokenizer.identity, **documents.key()}
        arrays = cached("documents", key, make)
    return DocumentTokens(arrays["tokens"], arrays["starts"], key)
