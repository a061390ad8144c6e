"""Wrong configurations as data: the input, and what the error must contain.

A row is (given, text, ...). In `texts`, `given` is a whole file; elsewhere it is overrides of the file `BASE`, or sections
that replace those of `BASE`. Each text must be in the message: the key, and the value given or what would work.
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
