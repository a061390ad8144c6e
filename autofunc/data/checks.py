"""Checks that datasets share."""

from __future__ import annotations

from autofunc.errors import DataError

MOST_TOKENS_PER_ROW = 1 << 24
"""The most tokens a row may have."""


def check_length(dataset: str, seq_len: int | None) -> None:
    """Refuse rows that are empty, or longer than any model takes; None means not given.

    Raises:
        DataError: naming the argument.
    """
    check_at_least_one(dataset, seq_len=seq_len)
    if seq_len is not None and seq_len > MOST_TOKENS_PER_ROW:
        raise DataError(f"{dataset}: seq_len={seq_len}, expected at most {MOST_TOKENS_PER_ROW:,}")


def check_at_least_one(dataset: str, **numbers: int | None) -> None:
    """Refuse numbers below 1; None means not given.

    Raises:
        DataError: naming the argument.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise DataError(f"{dataset}: {name}={number}, expected at least 1")
