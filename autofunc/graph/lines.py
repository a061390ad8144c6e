"""The line of the user's code that created a node."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import fx

from autofunc.installed import is_of_torch

_OWN = str(Path(__file__).parents[1])


def line_of(node: fx.Node) -> str:
    """Return the user's line that created a node, for messages: file, number and text."""
    return line_in(str(node.meta.get("stack_trace", ""))) or "its line is unknown"


def line_in(trace: str) -> str:
    """Return the innermost line of a trace that torch recorded, preferring the user's; empty if the trace is."""
    frames: list[list[str]] = []
    for line in map(str.strip, trace.strip().splitlines()):
        if line.startswith("File "):
            frames.append([line.replace('"', "")])
        elif frames:
            frames[-1].append(line)
    files = [each[0].removeprefix("File ").partition(", line ")[0] for each in frames]
    users = [each for each, file in zip(frames, files, strict=True) if not is_of_torch(file) and not file.startswith(_OWN)]
    return ": ".join(line.replace('"', "") for line in (users or frames or [[]])[-1][:2])


def first_lines(lines: Iterable[str]) -> str:
    """Return the first three distinct lines, for messages."""
    distinct = list(dict.fromkeys(lines))
    return "; ".join(distinct[:3]) + (f"; and {len(distinct) - 3} more" if len(distinct) > 3 else "")
