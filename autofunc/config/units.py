"""Sizes with units: `512MB` is 512 times 1000 * 1000 bytes, `2GiB` is 2 times 1024 * 1024 * 1024."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER_AND_UNIT = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)\s*", re.IGNORECASE)
_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 10 ** (3 * _power), f"{_letter}ib": 2 ** (10 * _power)}

MOST = 2**60
"""The largest size accepted, in bytes."""


def parse_bytes(given: object) -> int:
    """Parse a number of bytes: a whole number, or text with a unit in upper or lower case.

    Raises:
        ValueError: saying what is accepted.
    """
    if isinstance(given, (int, float)) and not isinstance(given, bool) and 1 <= given <= MOST and given == given // 1:
        return int(given)
    found = _NUMBER_AND_UNIT.fullmatch(given) if isinstance(given, str) else None
    if found and found[2].lower() in _UNITS:
        size = round(Fraction(found[1]) * _UNITS[found[2].lower()])
        if 1 <= size <= MOST:
            return size
    raise ValueError(
        "expected a number of bytes, such as 2000000, 512MB or 2GiB (units B, kB, MB, GB, TB, KiB, MiB, GiB, TiB), "
        f"and at most {MOST >> 40:,}TiB"
    )
