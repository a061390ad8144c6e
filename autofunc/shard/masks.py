"""What an operator on DTensors that fails leaves behind.

An embedding that is cut along its vocabulary keeps a mask in a placement until its result is summed, and torch keeps the
placement for all operators like it. A function that fails in between leaves the mask there, and every later embedding
compares its own with it: an error for other rows, and for fake ones a value that nobody knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The caches have no public name; the debugging of torch has a function that clears both; tried with torch 2.13.0.
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


@contextmanager
def masks_let_go() -> Iterator[None]:
    """Placements with masks do not outlive a function that fails."""
    try:
        yield
    except BaseException:
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
        raise
