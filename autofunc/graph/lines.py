"""Where in the user's code a node was made."""

from __future__ import annotations

from torch import fx


def line_of(node: fx.Node) -> str:
    """The user's line that made a node: file, number and text, for messages."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace", "")).strip().splitlines()]
    where = [line for line in lines if line.startswith("File ")]
    return f"{where[-1]}: {lines[-1]}".replace('"', "") if where else "its line is not known"
