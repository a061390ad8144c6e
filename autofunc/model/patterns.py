"""Patterns of parameter paths, each of which has to match something."""

from __future__ import annotations

from collections.abc import Sequence

from autofunc import tree
from autofunc.errors import ModelError, one_of


def matching(what: str, patterns: Sequence[str], known: Sequence[str]) -> frozenset[str]:
    """Return the paths that patterns match; `*` crosses dots.

    Args:
        what: the patterns' name in error messages.
        patterns: shell-style.
        known: all paths.

    Raises:
        ModelError: for a pattern without a match, naming the nearest path.
    """
    unused = [pattern for pattern in patterns if not any(tree.matches(path, [pattern]) for path in known)]
    if unused:
        raise ModelError(f"{what} pattern {unused[0]!r} matches no parameter; {one_of(unused[0], known)}")
    return frozenset(path for path in known if tree.matches(path, patterns))
