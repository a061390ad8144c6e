"""Foreign errors in brief: the type, and the beginning of the message."""

from __future__ import annotations

import pytest

from autofunc.errors import in_brief
from autofunc.shown import reason


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("short", "short"),
        ("", ""),
        ("\n two\nlines\n", "two\nlines"),
        ("a\x1b[31mb\tc", "a\\x1b[31mb\tc"),
        ("x" * 701, "x" * 700 + " ... (1 line of 701 characters)"),
        ("line\n" * 9, "line\n" * 7 + "line ... (9 lines of 44 characters)"),
    ],
)
def test_in_brief(message: str, told: str) -> None:
    assert reason(ValueError(message)) == told
    assert in_brief(ValueError(message)) == f"ValueError: {told}"


def test_notes_are_included() -> None:
    error = KeyError("name")
    error.add_note("in row 3")
    assert in_brief(error) == "KeyError: 'name'\nin row 3"
