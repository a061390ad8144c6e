"""Where in the user's code a node was made."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def line_of(node: fx.Node) -> str:
    """The user's line that made a node: file, number and text, for messages."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).strip().splitlines()]
    where = [line for line in lines if line.startswith("File ")]
    return f"{where[-1]}: {lines[-1]}".replace('"', "") if where else "its line is not known"


def first_lines(lines: Iterable[str]) -> str:
    """The first of some lines, each once, for messages."""
    distinct = list(dict.fromkeys(lines))
    return "; ".join(distinct[:3]) + (f"; and {len(distinct) - 3} more" if len(distinct) > 3 else "")
