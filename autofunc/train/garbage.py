"""Garbage collection at fixed steps, so that all ranks pause together, between steps."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def collecting_between(steps: Iterable[T], every: int | None) -> Iterator[T]:
    """Iterate over steps, collecting garbage every so many of them and at no other time; None leaves it to Python.

    Python's own collection resumes when the iterator ends or is dropped.
    """
    if every is None:
        yield from steps
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for number, step in enumerate(steps, start=1):
            yield step
            if number % every == 0:
                gc.collect()
    finally:
        if was_enabled:
            gc.enable()
