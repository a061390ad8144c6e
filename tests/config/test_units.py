"""Sizes with units."""

from __future__ import annotations

import pytest

from autofunc.config.units import parse_bytes


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (512, 512),
        (1e9, 10**9),
        ("512", 512),
        ("512 B", 512),
        ("4kB", 4000),
        ("4 KiB", 4096),
        ("512MB", 512 * 10**6),
        ("512mib", 512 * 2**20),
        ("2GiB", 2**31),
        ("1.5 GB", 1_500_000_000),
        ("3TB", 3 * 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes(given: object, size: int) -> None:
    assert parse_bytes(given) == size


@pytest.mark.parametrize(
    "given", [0, -1, 1.5, float("inf"), float("nan"), True, "", "GB", "-2GB", "2XB", "2G", "0.1B", [1], None]
)
def test_invalid_sizes(given: object) -> None:
    with pytest.raises(ValueError, match="expected a number of bytes, such as 2000000, 512MB or 2GiB"):
        parse_bytes(given)
