"""Rows of a table file (.jsonl, .json, .csv, .parquet), each with its location; nothing is unpacked or executed."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from autofunc.errors import DataError, some_of
from autofunc.foreign_file import check_file, compression, decoded, parse_json, read_plain
from autofunc.shown import quoted, reason, shown

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

MOST_TABLE_BYTES = 2**34
"""The largest table file: its rows are kept in memory."""

MOST_ROWS = 50_000_000
"""The most rows a parquet file may claim: a few bytes can encode any number of equal rows."""

Located = tuple[str, dict[str, Any]]
"""(location in its file, row)."""


def read_table(path: Path, columns: Sequence[str]) -> Iterator[Located]:
    """Yield the rows of a file in order, each with its line or its number, counted from 1.

    Args:
        path: of the file.
        columns: that each row must have.

    Raises:
        DataError: naming the file and the line, if it isn't readable as a table or a row is invalid or lacks a column.
    """
    check_plain(path)
    readers = {".jsonl": _lines, ".json": _document, ".csv": _sheet, ".parquet": _parquet}
    for where, row in readers[path.suffix](path, columns):
        check_columns(where, row, columns)
        yield where, row


def check_columns(where: str, found: Collection[str], columns: Sequence[str]) -> None:
    """Refuse a row or table that lacks a column.

    Raises:
        DataError: naming the column and the location.
    """
    missing = [column for column in columns if column not in found]
    if missing:
        raise DataError(
            f"{where} has no column {missing[0]!r}; found {some_of(found, 8) or 'none'}, expected {', '.join(columns)}"
        )


def check_plain(path: Path) -> None:
    """Refuse anything but an ordinary file of one of these kinds, and compressed or oversized files.

    Raises:
        DataError: naming the file.
    """
    check_file(path, DataError, MOST_TABLE_BYTES)
    packed = compression(path)
    if packed is not None:
        raise DataError(f"{shown(path)} is compressed ({packed}); unpack it first")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{shown(path)} is {shown(path.suffix) or 'without a suffix'}; expected {', '.join(SUFFIXES)}")


def _lines(path: Path, columns: Sequence[str]) -> Iterator[Located]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"line {number} of {shown(path)}"
                yield where, _row(parse_json(decoded(line, path, DataError, number), where, DataError), where)


def _document(path: Path, columns: Sequence[str]) -> Iterator[Located]:
    """Read a list of objects; or an object on each line, as many .json files have."""
    with path.open("rb") as file:
        begin = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    if begin.startswith(b"{"):
        yield from _lines(path, columns)
        return
    document = parse_json(read_plain(path, DataError), shown(path), DataError)
    if not isinstance(document, list):
        raise DataError(f"{shown(path)} is {_kind(document)}; expected a list of objects, or an object on each line")
    for number, row in enumerate(document, 1):
        where = f"row {number} of {shown(path)}"
        yield where, _row(row, where)


def _sheet(path: Path, columns: Sequence[str]) -> Iterator[Located]:
    with path.open("rb") as file:
        texts = (decoded(line, path, DataError, number) for number, line in enumerate(file, 1))
        reader = csv.reader(texts, strict=True)
        try:
            header = next(reader, [])
            double = [name for number, name in enumerate(header) if name in header[:number]]
            if double:
                raise DataError(f"line 1 of {shown(path)} has the column {quoted(double[0])} twice")
            check_columns(f"line 1 of {shown(path)}", header, columns)
            for fields in reader:
                where = f"line {reader.line_num} of {shown(path)}"
                if fields and len(fields) != len(header):
                    raise DataError(f"{where} has {len(fields)} fields; expected {len(header)}: {some_of(header, 8)}")
                if fields:
                    yield where, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {shown(path)} is not valid CSV: {reason(error)}") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Located]:
    from pyarrow import ArrowException, parquet  # takes a second to import

    try:
        with parquet.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            if rows > MOST_ROWS:
                raise DataError(f"{shown(path)} has {rows:,} rows; expected at most {MOST_ROWS:,}")
            check_columns(shown(path), file.schema_arrow.names, columns)
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {shown(path)}", row
    except (ArrowException, OSError) as error:
        raise DataError(f"{shown(path)} is not a parquet file: {reason(error)}") from error


def _row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_kind(value)}; expected an object with a key for each column")
    return value


def _kind(value: Any) -> str:
    return f"{quoted(value)} ({type(value).__name__})"
