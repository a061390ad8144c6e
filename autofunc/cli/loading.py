"""Importing torch, and modules built on it, which takes seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from autofunc.progress_bar import CONSOLE
from autofunc.timing import clock


@contextmanager
def loading_torch() -> Iterator[None]:
    """Import during the block, with a spinner on terminals. Imported objects stay, so the garbage collector skips them."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    with CONSOLE.status("loading torch"):
        yield
    gc.freeze()
    gc.enable()
    clock.done("imports")
