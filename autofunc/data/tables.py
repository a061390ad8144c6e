"""Rows with named columns: of files, of a folder of files, or of a hub dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autofunc.data.array_cache import content_of
from autofunc.data.folder import tables_in
from autofunc.data.table_file import SUFFIXES, Located, check_columns, check_plain, read_table
from autofunc.errors import DataError, in_brief
from autofunc.foreign_file import NOT_THERE, is_folder, unfit
from autofunc.hub_access import cache_without_network
from autofunc.shown import quoted, shown


class Tables:
    """The rows of a split.

    Args:
        of: a file (.jsonl, .json, .csv, .parquet), several, a folder of such files named after their splits, or a hub
            name.
        split: of a folder or a hub dataset; a file has only "train".
        subset: of a hub dataset that has several.
        limit: take only the first rows.

    Raises:
        DataError: if a file, folder, split or hub dataset cannot be found.
    """

    def __init__(
        self, of: str | Sequence[str], split: str, subset: str | None = None, *, limit: int | None = None
    ) -> None:  # fmt: skip
        self._of, self._split, self._subset, self._limit = of, split, subset, limit
        self.files: list[Path] = []
        self._table: Any = None
        for each in [of] if isinstance(of, str) else of:
            path = Path(each).expanduser()
            is_local = unfit(path) != NOT_THERE or path.suffix in SUFFIXES or each.startswith((".", "/", "~"))
            if not is_local and isinstance(of, str):
                self._table = self._from_hub(of)
            elif unfit(path) == NOT_THERE:
                raise DataError(f"there is no file or folder {quoted(each)} (looked in {shown(Path.cwd())})")
            elif is_folder(path):
                self.files += tables_in(path, split)
            elif split == "train":
                self.files.append(path)
            else:
                raise DataError(f"{shown(path)} is a file, which has only the split 'train'; got {quoted(split)}")
        if not self.files and self._table is None:
            raise DataError(f"{quoted(of)} names no file")

    def __str__(self) -> str:
        return shown(self._of) if isinstance(self._of, str) else f"{len(self.files)} files"

    def key(self) -> dict[str, Any]:
        """Return what identifies the rows, for a cache key.

        Raises:
            DataError: if one of the files isn't a table.
        """
        for file in self.files:
            check_plain(file)
        content = content_of(self.files) if self._table is None else [str(self._table._fingerprint)]
        return {"content": content, "limit": self._limit}

    def rows(self, columns: Sequence[str]) -> Iterator[Located]:
        """Yield the rows in order, each with its location.

        Args:
            columns: that each row must have.

        Raises:
            DataError: naming a row that cannot be read or lacks a column.
        """
        return itertools.islice(self._all(columns), self._limit)

    def _all(self, columns: Sequence[str]) -> Iterator[Located]:
        for file in self.files:
            yield from read_table(file, columns)
        if self._table is not None:
            check_columns(shown(self._of), self._table.column_names, columns)
            for number, row in enumerate(self._table, 1):
                yield f"row {number} of {shown(self._of)}", row

    def _from_hub(self, name: str) -> Any:
        import datasets  # takes seconds to import

        datasets.disable_progress_bars()
        with cache_without_network() as network:
            try:
                return datasets.load_dataset(name, self._subset, split=self._split)
            except Exception as error:  # datasets raises a different one for each cause
                message = in_brief(error)
                of = f"{quoted(name)}, split {quoted(self._split)}"
                raise DataError(f"{of}, cannot be loaded{network}: {message}") from error


def text_of(where: str, what: str, value: object) -> str:
    """Return a value of a row that has to be a string.

    Raises:
        DataError: if it is not, or has half a surrogate pair, which JSON can encode.
    """
    try:
        if isinstance(value, str) and value.encode(errors="surrogateescape") is not None:
            return value
    except UnicodeEncodeError:
        pass
    raise DataError(f"{where}: {what} is {quoted(value)}; expected a string")
