"""A module is captured as a pure function: whatever its forward leaves behind in it is undone, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from autofunc.captured.snapshot import Change, Snapshot
from autofunc.errors import ModelError


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Put back every attribute of every submodule afterwards, the same objects with the same contents."""
    before = Snapshot(module, values=False)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def left_as_it_was(module: nn.Module, what: str) -> Iterator[None]:
    """Refuse a forward that changes an attribute of any submodule, or what is in it, and undo it.

    Plain values inside objects, such as a config, are undone only. What is written into tensors shows in the graph.

    Raises:
        ModelError: naming the class and the attribute.
    """
    before = Snapshot(module, values=False)
    changes: list[Change] = []
    try:
        yield
    finally:
        changes += [change for change in before.changes() if change.how != "noted"]
        before.restore()
    if changes:
        stored = (
            f"{type(module.get_submodule(each.module)).__name__} ({each.module or 'the module itself'}) stores "
            f"{each.attribute!r}"
            for each in changes[:5]
        )
        raise ModelError(
            f"{what} keeps state from one forward to the next: {'; '.join(stored)}. Microbatches overlap in a "
            "pipeline, and a captured forward would do it only once; return it, or compute it in __init__"
        )
