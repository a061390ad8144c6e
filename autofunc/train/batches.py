"""A run's batches on their way to the device: the next one is read and sent while the device computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc import tree
from autofunc.data import Part
from autofunc.runtime.position import here


class Batch(NamedTuple):
    """The rows of one step."""

    parts: Sequence[Part]  # on the host
    sent: Sequence[dict[str, Any]]  # each part's batch, on the device

    @classmethod
    def of(cls, parts: Sequence[Part], device: torch.device) -> Batch:
        """Return the parts and their batches on a device."""
        return cls(parts, [to_device(part.batch, device) for part in parts])


class Batches:
    """Iterates over batches.

    An asynchronous device gets the next batch early: `read_ahead` reads it into pinned memory and sends it while the device
    computes. At most one batch is read ahead. An exception of the dataset is kept and raised when that batch is due, so
    that the step before it is not lost. On the CPU, reading early would only delay computation, so each batch is read when
    it is due.

    Args:
        parts: of each batch.
        device: of the batches.
        reads_ahead: whether to read early; the default depends on the device, see above.
    """

    def __init__(self, parts: Iterator[list[Part]], device: torch.device, *, reads_ahead: bool | None = None) -> None:
        self._parts, self._device = parts, device
        self._reads_ahead = device.type != "cpu" if reads_ahead is None else reads_ahead
        self._road = None if device.type == "cpu" else torch.Stream(device)
        self._next: Batch | None = None
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        batch, self._next = self._next or self._sent(next(self._parts)), None
        if self._road is not None:
            current = torch.accelerator.current_stream(self._device)
            current.wait_stream(self._road)
            for leaf in tree.leaves_and_spec([*batch.sent])[0]:
                if isinstance(leaf, Tensor):
                    leaf.record_stream(current)  # allocated on the copy stream
        return batch

    def read_ahead(self) -> None:
        """Read the next batch and start to send it; a no-op at the end, or if batches are not read ahead."""
        if not self._reads_ahead or self._next is not None or self._error is not None:
            return
        phase = here.phase
        try:
            parts = next(self._parts, None)
            self._next = None if parts is None else self._sent(parts)
        except Exception as error:  # from the user's dataset: raised when this batch is due
            self._error = error
        here.enter(phase)

    def _sent(self, parts: list[Part]) -> Batch:
        if self._road is None:
            return Batch.of(parts, self._device)
        pinned = [part._replace(batch={name: leaf.pin_memory() for name, leaf in part.batch.items()}) for part in parts]
        with self._road:
            return Batch.of(pinned, self._device)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors to a device."""
    return tree.map_leaves(  # type: ignore[no-any-return]
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, dict(batch)
    )
