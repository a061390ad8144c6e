"""Where in the user's code a node was made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import fx

from autofunc.installed import is_of_torch

_OWN = str(Path(__file__).parents[1])


def line_of(node: fx.Node) -> str:
    """The user's line that made a node: file, number and text, for messages."""
    return line_in(str(node.meta.get("stack_trace", ""))) or "its line is not known"


def line_in(trace: str) -> str:
    """The innermost line, of the user where there is one, of what torch notes of the code that made a node; empty where it
    noted none.
    """
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
    """The first of some lines, each once, for messages."""
    distinct = list(dict.fromkeys(lines))
    return "; ".join(distinct[:3]) + (f"; and {len(distinct) - 3} more" if len(distinct) > 3 else "")
