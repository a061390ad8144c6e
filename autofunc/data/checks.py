"""Checks that datasets share."""

from __future__ import annotations

from autofunc.errors import DataError


def check_at_least_one(dataset: str, **numbers: int | None) -> None:
    """Refuse numbers below 1; None means that the number was not given.

    Raises:
        DataError: naming the argument.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise DataError(f"{dataset}: {name}={number}, expected at least 1")
