"""Text from outside, as it may be shown: names, paths and values that act on no terminal, page or picture.

Whatever is no visible character is written as an escape: control codes, what turns the direction of writing, halves of
characters that are none in UTF-8. Whatever is long is shortened in its middle.
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
_MOST_LINES, _MOST_LETTERS = 8, 700  # of a text of others


def printable(text: str, keep: str = "") -> str:
    """All of a text; of what cannot be seen only the characters in `keep` stay.

    >>> printable("\\x1b[31m<b>\\n")
    '\\\\x1b[31m<b>\\\\n'
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escape(each) for each in text)


def shown(name: object, most: int = _MOST_CHARACTERS) -> str:
    """A name, a path, or what else is one line: printable, and of at most so many characters."""
    text = str(name)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[len(text) - most // 3 :]}"
    return printable(text)


def quoted(value: object) -> str:
    """What `repr` gives, but for what is long: printable, and a few lines at most."""
    return printable(_SHORT.repr(value))


def reason(error: BaseException) -> str:
    """What an error of another library says, in messages: its first lines."""
    return beginning(str(error))


def beginning(text: str) -> str:
    """A text of others, in messages: its first lines, and how many it has where they are too many, or too long."""
    text = text.strip()
    lines = text.splitlines()
    kept = "\n".join(lines[:_MOST_LINES])[:_MOST_LETTERS]
    if len(kept) < len(text):
        kept += f" ... ({len(lines):,} line{'s' * (len(lines) != 1)} of {len(text):,} characters)"
    return printable(kept, keep="\n\t")


def literal(text: str) -> Text:
    """A text for rich, which would read markup and emoji in it."""
    from rich.text import Text

    return Text(printable(text, keep="\n"))


def size_in_words(num_bytes: int) -> str:
    """A size, as people read it.

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
    """Of containers the first few, of texts the two ends."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 4, 4, 4

    def repr_int(self, number: int, _level: int) -> str:
        """All digits of a large number would take long, and Python refuses them."""
        bits = number.bit_length()
        return repr(number) if bits < 3 * _MOST_DIGITS else f"{'-' * (number < 0)}2**{bits - 1} or more"


_SHORT = _Short()


def in_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, in brief.

    >>> in_ranges([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)
