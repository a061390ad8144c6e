"""A tp axis used together with cp ranks, while the layers that run over it are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autofunc.spreading import along, axis_named
from autofunc.spreading.movements import gather


class _GatheredAxis:
    """An axis that gathers the cut values it hands out, so that plain tensors are recorded instead of DTensors."""

    def __init__(self, name: str) -> None:
        self._name, self._axis = name, axis_named(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._axis, name)

    def handed_out(self, x: Tensor, dim: int) -> Tensor:
        """See `Axis.handed_out`."""
        return gather(x, self._name, dim, (x.shape[dim] * self._axis.size,))


@contextmanager
def handing_out_whole(axis: str | None) -> Iterator[None]:
    """Make `axis` hand out whole values inside the block; does nothing for None."""
    if axis is None:
        yield
        return
    with along({axis: _GatheredAxis(axis)}):
        yield
