"""A module is captured as a pure function: what a forward leaves behind is undone, and refused where the next reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autofunc.captured.snapshot import Change, Snapshot, put_back


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Put back every attribute of every submodule afterwards, the same objects with the same contents."""
    before = Snapshot(module, values=False)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def written_back(module: nn.Module) -> Iterator[None]:
    """Write tensors that take the places of buffers into those instead: `self.mean = 0.9 * self.mean + 0.1 * x.mean()`.

    What is not saved with the module is its own affair.
    """
    held = [
        (part, name, leaf)
        for part in module.modules()
        for name, leaf in part._buffers.items()
        if leaf is not None and name not in part._non_persistent_buffers_set
    ]
    yield
    for part, name, leaf in held:
        new = part._buffers.get(name)
        if new is not None and new is not leaf and (new.shape, new.dtype) == (leaf.shape, leaf.dtype):
            with torch.no_grad():
                part._buffers[name] = leaf.copy_(new)


class LeftBehind:
    """What a forward changes in a module beside tensors' values: it is undone, and can be there when it runs again.

    Plain values inside objects, such as a config, are undone only. What is written into tensors shows in the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self.changes: list[Change] = []
        self._module = module
        self._left: list[tuple[Any, Any]] = []

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Around a forward, which finds what the last one left."""
        before = Snapshot(self._module, values=False)
        put_back(self._left)
        try:
            yield
        finally:
            self.changes = [change for change in before.changes() if change.how != "noted"]
            self._left = before.left()
            before.restore()

    @property
    def words(self) -> str:
        """The first changes, by class and attribute."""
        return "; ".join(
            f"{type(self._module.get_submodule(each.module)).__name__} ({each.module or 'the module itself'}) stores "
            f"{each.attribute!r}"
            for each in self.changes[:5]
        )
