"""Foreign text made safe to show: names, paths and values that cannot affect a terminal, page or picture.

Invisible characters become escapes: control codes, changes of writing direction, lone surrogates. Long text is shortened in
the middle.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_MOST_CHARACTERS = 200
_MOST_DIGITS = 40
_MOST_LINES, _MOST_LETTERS = 8, 700  # of foreign text


def printable(text: str, keep: str = "") -> str:
    """Escape invisible characters of a text, except those in `keep`.

    >>> printable("\\x1b[31m<b>\\n")
    '\\\\x1b[31m<b>\\\\n'
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escape(each) for each in text)


def shown(name: object, most: int = _MOST_CHARACTERS) -> str:
    """Return a name, path or other one-line text, printable and limited in length."""
    text = str(name)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[len(text) - most // 3 :]}"
    return printable(text)


def quoted(value: object) -> str:
    """Return `repr`, printable and shortened to a few lines."""
    return printable(_SHORT.repr(value))


def reason(error: BaseException) -> str:
    """Return the first lines of a foreign error's message."""
    return beginning(str(error))


def beginning(text: str) -> str:
    """Return the first lines of a foreign text, and its number of lines if some are left out."""
    text = text.strip()
    lines = text.splitlines()
    kept = "\n".join(lines[:_MOST_LINES])[:_MOST_LETTERS]
    if len(kept) < len(text):
        kept += f" ... ({len(lines):,} line{'s' * (len(lines) != 1)} of {len(text):,} characters)"
    return printable(kept, keep="\n\t")


def literal(text: str) -> Text:
    """Return a text that rich prints as it is, without interpreting markup and emoji."""
    from rich.text import Text

    return Text(printable(text, keep="\n"))


def size_in_words(num_bytes: int) -> str:
    """Return a size for people.

    >>> size_in_words(3 << 19)
    '1.5 MiB'
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class _Short(reprlib.Repr):
    """Shortens containers to their first few items, and texts to both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 4, 4, 4

    def repr_int(self, number: int, _level: int) -> str:
        """Abbreviate large numbers: printing all digits would be slow, and Python refuses to."""
        bits = number.bit_length()
        return repr(number) if bits < 3 * _MOST_DIGITS else f"{'-' * (number < 0)}2**{bits - 1} or more"


_SHORT = _Short()


def in_ranges(numbers: Sequence[int]) -> str:
    """Abbreviate ascending numbers.

    >>> in_ranges([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)
