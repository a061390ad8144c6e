"""The line of the user's code that created a node."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def line_of(node: fx.Node) -> str:
    """Return the user's line that created a node, for messages: file, number and text."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).strip().splitlines()]
    where = [line for line in lines if line.startswith("File ")]
    return f"{where[-1]}: {lines[-1]}".replace('"', "") if where else "its line is unknown"


def first_lines(lines: Iterable[str]) -> str:
    """Return the first three distinct lines, for messages."""
    distinct = list(dict.fromkeys(lines))
    return "; ".join(distinct[:3]) + (f"; and {len(distinct) - 3} more" if len(distinct) > 3 else "")
