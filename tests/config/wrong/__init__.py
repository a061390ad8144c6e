"""Configurations that are wrong, as data: what is given, and what the error must say of it.

A row is (given, said, ...). In `texts`, what is given is a whole file; elsewhere it is overrides of the file `BASE`, or
sections in the place of those that it has. Each text that is said must be in the message: the key, and what was given or
what would work.
"""

from __future__ import annotations

from tests.config.wrong import axes, other_tools, targets, texts, together, values

BY_OVERRIDES: dict[str, list[tuple[dict[str, str] | list[str] | str, ...]]] = {
    "values": values.WRONG,
    "targets": targets.WRONG,
    "together": together.WRONG,
    "axes": axes.WRONG,
    "other tools": other_tools.WRONG,
}
BY_TEXT = texts.WRONG

__all__ = ["BY_OVERRIDES", "BY_TEXT"]
