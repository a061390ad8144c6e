"""Which documents share a row: each whole, but for those that are longer than a row, and with little room left over."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def packed(starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Rows of pieces of documents: the longest pieces first, each into the fullest row that has room for it.

    Documents that are longer than a row are cut into pieces of its length; pieces of one token have nothing to learn and
    are left out.

    Args:
        starts: of each document, and the end of the last.
        length: of a row.

    Returns:
        `begins` and `lengths` of pieces, in the order of rows; `rows`, where each row's pieces begin, and the end.
    """
    begins, lengths = _pieces(starts, length)
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # rows by what is left in them
    sizes: list[int] = []  # of room, in order
    for piece in order.tolist():
        size = int(lengths[piece])
        at = bisect_left(sizes, size)
        if at == len(sizes):
            row, left = len(rows), length
            rows.append([])
        else:
            left = sizes[at]
            row = room[left].pop()
            if not room[left]:
                del room[left], sizes[at]
        rows[row].append(piece)
        left -= size
        if left > 1:
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left].append(row)
    in_order = sorted(map(sorted, rows))  # as the documents are
    flat = np.array([piece for row in in_order for piece in row], dtype=np.int64)
    return {
        "begins": begins[flat], "lengths": lengths[flat], "rows": np.cumsum([0, *map(len, in_order)], dtype=np.int64)
    }  # fmt: skip


def _pieces(starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(where each begins, its length)."""
    sizes = np.diff(starts)
    counts = -(-sizes // length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    begins = np.repeat(starts[:-1], counts) + number * length
    lengths = np.minimum(np.repeat(starts[1:], counts) - begins, length)
    return begins[lengths > 1], lengths[lengths > 1]
