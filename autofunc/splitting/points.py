"""Split points: from names and globs to the layers at which new stages begin."""

from __future__ import annotations

import re
from collections.abc import Sequence

from autofunc.errors import SplitError, one_of


def resolve_points(layers: Sequence[str], points: Sequence[str]) -> list[int]:
    """The positions in `layers` at which a new stage begins.

    A point is a layer's name, or a glob in which `*` stops at a dot; a unique suffix is enough (`h.*` finds
    `transformer.h.0`). A glob cuts before each layer it matches. A cut before the first layer is dropped.

    Raises:
        SplitError: for a point that is no string, matches nothing or several places, comes twice or out of order.
    """
    cuts: list[int] = []
    for point in points:
        if not isinstance(point, str):
            raise SplitError(f"split point {point!r} is {type(point).__name__}; expected the name of a layer or a glob")
        for position in _matches(layers, point):
            if cuts and position == cuts[-1]:
                raise SplitError(f"split point {point!r}: a stage already begins at {layers[position]!r}")
            if cuts and position < cuts[-1]:
                raise SplitError(
                    f"split point {point!r}: {layers[position]!r} runs before {layers[cuts[-1]]!r}; "
                    "list split points in the order in which the layers run"
                )
            cuts.append(position)
    return [cut for cut in cuts if cut > 0]


def _matches(layers: Sequence[str], point: str) -> list[int]:
    exact = [position for position, name in enumerate(layers) if name == point]
    if exact:
        return exact
    pattern = r"\.".join(re.escape(part).replace(r"\*", "[^.]*") for part in point.split("."))
    found = [position for position, name in enumerate(layers) if re.fullmatch(pattern, name)]
    if not found:
        suffixed = [(position, re.fullmatch(rf"(.+\.){pattern}", name)) for position, name in enumerate(layers)]
        hits = [(position, match.group(1)) for position, match in suffixed if match]
        prefixes = sorted({prefix for _, prefix in hits})
        if len(prefixes) > 1:
            candidates = ", ".join(layers[position] for position, _ in hits)
            raise SplitError(
                f"split point {point!r} is ambiguous: it is the end of {candidates}; write one of them in full"
            )
        found = [position for position, _ in hits]
    if not found:
        raise SplitError(f"split point {point!r} names no layer: {one_of(point, layers)}")
    return found
