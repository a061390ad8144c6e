"""Capture without side effects: what a forward leaves in a module is undone, and refused if the next forward reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autofunc.captured.snapshot import Change, Snapshot, put_back


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Restore every attribute of every submodule afterwards: the same objects with the same contents."""
    before = Snapshot(module, values=False)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def written_back(module: nn.Module) -> Iterator[None]:
    """Write tensors that replace buffers into the buffers instead: `self.mean = 0.9 * self.mean + 0.1 * x.mean()`.

    Buffers that are not saved with the module are left alone.
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
    """A forward's changes to a module except tensors' values: they are undone, and can be put back for a second run.

    Plain values inside objects, such as a config, are only undone. Writes into tensors show in the graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self.changes: list[Change] = []
        self._module = module
        self._left: list[tuple[Any, Any]] = []

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Wrap a forward, which finds what the last one left."""
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
        """The first changes, by class and attribute, for messages."""
        return "; ".join(
            f"{type(self._module.get_submodule(each.module)).__name__} ({each.module or 'the module itself'}) stores "
            f"{each.attribute!r}"
            for each in self.changes[:5]
        )
