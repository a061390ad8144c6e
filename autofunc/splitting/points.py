"""Split points: from names and globs to the places where new stages begin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from autofunc.errors import SplitError, one_of
from autofunc.model import CutPoints
from autofunc.shown import quoted


def resolve_points(places: CutPoints, points: Sequence[str]) -> list[str]:
    """Return the names of the places where a new stage begins.

    A point is a name, or a glob in which `*` stops at a dot; a unique suffix is enough (`h.*` finds `transformer.h.0`). A
    glob cuts before each place it matches. A cut before the first place is dropped.

    Raises:
        SplitError: for a point that is not a string, matches no place, is ambiguous, is refused, comes twice or is out of
            order.
    """
    first = min(places.start.values(), default=0)
    cuts: list[str] = []
    for point in points:
        if not isinstance(point, str):
            raise SplitError(
                f"split point {quoted(point)} is {type(point).__name__}; expected the name of a layer or a glob"
            )
        for name in _matches(places, point):
            position, last = places.start[name], places.start[cuts[-1]] if cuts else -1
            if position == last:
                raise SplitError(f"split point {quoted(point)}: a stage already begins at {quoted(cuts[-1])}")
            if position < last:
                raise SplitError(
                    f"split point {quoted(point)}: {quoted(name)} runs before {quoted(cuts[-1])}; list split points in "
                    "the order in which the layers run"
                )
            cuts.append(name)
    return [name for name in cuts if places.start[name] > first]


def _matches(places: CutPoints, point: str) -> list[str]:
    found = _named(places.start, point)
    if not found:
        refused = _named(places.refused, point)
        if refused:
            raise SplitError(
                f"split point {quoted(point)}: {quoted(refused[0])} {places.refused[refused[0]]}; "
                f"{one_of(point, places.start)}"
            )
        raise SplitError(f"split point {quoted(point)} names no layer: {one_of(point, _ends(places.start, point))}")
    return found


def _ends(names: Iterable[str], point: str) -> list[str]:
    """Return the names, shortened to as many components as the point has where that is unambiguous."""
    depth = point.count(".") + 1
    ends = [".".join(name.split(".")[-depth:]) for name in names]
    return [end if ends.count(end) == 1 else name for end, name in zip(ends, names, strict=True)]


def _named(names: Iterable[str], point: str) -> list[str]:
    known = list(names)
    if point in known:
        return [point]
    pattern = r"\.".join(re.escape(part).replace(r"\*", "[^.]*") for part in point.split("."))
    found = [name for name in known if re.fullmatch(pattern, name)]
    if found:
        return found
    matches = [(name, re.fullmatch(rf"(.+\.){pattern}", name)) for name in known]
    hits = [(name, match.group(1)) for name, match in matches if match]
    if len({prefix for _, prefix in hits}) > 1:
        candidates = ", ".join(name for name, _ in hits[:8])
        raise SplitError(f"split point {quoted(point)} is ambiguous: {candidates} end in it; write one of them in full")
    return [name for name, _ in hits]
