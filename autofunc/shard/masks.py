"""Cleaning up after failed operators on DTensors.

An embedding cut along its vocabulary keeps a mask in a placement until its result is summed, and torch caches the
placement for all similar operators. A function that fails in between leaves the mask there, and every later embedding
compares its own mask with it: an error for different rows, and for fake tensors a read of unknown values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The caches have no public name; torch's debugging module has a function that clears both; tried with torch 2.13.0.
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


@contextmanager
def masks_let_go() -> Iterator[None]:
    """Clear placements with masks if a function fails."""
    try:
        yield
    except BaseException:
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        raise
