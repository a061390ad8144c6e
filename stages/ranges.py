"""Range checks of a model's configuration, done before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from autofunc.errors import ModelError

MOST, MOST_LAYERS = 1 << 24, 1 << 16
"""The largest size of a dim, and the largest number of layers."""


def check_sizes(module: str, config: Any, names: Iterable[str], most: int = MOST) -> None:
    """Refuse sizes below 1 or above `most`; None means derived from another size.

    Raises:
        ModelError: naming the first.
    """
    for name in names:
        size = getattr(config, name)
        if size is not None and not 1 <= size <= most:
            expected = "at least 1" if size < 1 else f"at most {most:,}"
            raise ModelError(f"{module}: {name}={size}, expected {expected}")


def check_probabilities(module: str, config: Any, names: Iterable[str]) -> None:
    """Refuse dropout probabilities outside [0, 1): 1 would drop everything.

    Raises:
        ModelError: naming the first.
    """
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ModelError(f"{module}: {name}={getattr(config, name)} is not a probability in [0, 1)")


def check_scales(module: str, config: Any, names: Iterable[str]) -> None:
    """Refuse standard deviations, variances and the like that are negative, infinite or NaN.

    Raises:
        ModelError: naming the first.
    """
    for name in names:
        scale = getattr(config, name)
        if not (math.isfinite(scale) and scale >= 0):
            raise ModelError(f"{module}: {name}={scale}, expected a finite number of at least 0")
