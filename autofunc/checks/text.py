"""Findings as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autofunc.checks.verdict import TITLES, Verdict
from autofunc.shown import printable, shown

WIDTH = 80
_COLOURS = {"pass": "32", "warn": "33", "fail": "31", "skip": "2"}
_MOST_POINTS = 16


def summary(subject: str, verdicts: Sequence[Verdict]) -> str:
    """Return the number of findings of each status, in one line."""
    words = {"fail": "failed", "warn": "warnings", "pass": "passed", "skip": "skipped"}
    counted = (f"{sum(each.status == status for each in verdicts)} {word}" for status, word in words.items())
    return f"{shown(subject)}: " + ", ".join(counted)


def table(subject: str, verdicts: Sequence[Verdict], colour: bool = False) -> str:
    """Return findings as text, at most 80 columns wide, followed by the cut points and what crosses there.

    Args:
        subject: the module's name.
        verdicts: the findings.
        colour: paint the statuses with ANSI colours.
    """
    lines = _wrapped(summary(subject, verdicts), "")
    for verdict in verdicts:
        lines += _finding(verdict, colour)
    points = [point for each in verdicts if each.code == "P1" for point in each.data.get("split_points", ())]
    return "\n".join([*lines, *_points(points)])


def _finding(verdict: Verdict, colour: bool) -> list[str]:
    status = f"{verdict.status:<4}"
    painted = f"\x1b[{_COLOURS[verdict.status]}m{status}\x1b[0m" if colour else status
    title, message = TITLES.get(verdict.code), printable(verdict.message, keep="\n")
    text = _wrapped(f"{title}: {message}" if title else message, " " * 10)
    text[0] = f"{verdict.code:<4}{painted}  {text[0].lstrip()}"
    return text + (_wrapped(f"at {shown(verdict.where)}", " " * 10) if verdict.where else [])


def _points(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """List the cut points, or only those at which layers begin if there are many."""
    every = list(points)
    shown = every if len(every) <= _MOST_POINTS else [point for point in every if point["layer"]] or every
    rows = [(_fitted(point["names"][0]), f"{point['values']:,}", f"{point['bytes']:,}") for point in shown[:_MOST_POINTS]]
    if not rows:
        return []
    lines = ["", f"{'a stage may begin at':<44}{'tensors':>12}{'bytes received':>20}"]
    lines += [f"{name:<44}{values:>12}{size:>20}" for name, values, size in rows]
    return lines if len(rows) == len(every) else [*lines, f"and at {len(every) - len(rows)} more places"]


def _fitted(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 42 else f"{name[:16]}...{name[-23:]}"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False) or [indent]
