"""Packing of documents into rows: documents stay whole unless longer than a row, and little room is left over."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def packed(starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Pack pieces of documents into rows by best-fit decreasing: longest first, each into the fullest row with room.

    Documents longer than a row are cut into pieces of its length; one-token pieces have nothing to train on and are
    dropped.

    Args:
        starts: of each document, and the end of the last; shape (documents + 1,).
        length: of a row.

    Returns:
        `begins` and `lengths` of the pieces, in row order; `rows`: where each row's pieces begin, and the end. All int64.
    """
    begins, lengths = _pieces(starts, length)
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # rows by the tokens that still fit
    sizes: list[int] = []  # the keys of room, sorted
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
    in_order = sorted(map(sorted, rows))  # in document order
    flat = np.array([piece for row in in_order for piece in row], dtype=np.int64)
    return {
        "begins": begins[flat], "lengths": lengths[flat], "rows": np.cumsum([0, *map(len, in_order)], dtype=np.int64)
    }  # fmt: skip


def _pieces(starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (begins, lengths) of the pieces."""
    sizes = np.diff(starts)
    counts = -(-sizes // length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # index of a piece in its document
    begins = np.repeat(starts[:-1], counts) + number * length
    lengths = np.minimum(np.repeat(starts[1:], counts) - begins, length)
    return begins[lengths > 1], lengths[lengths > 1]
