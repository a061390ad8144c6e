"""A tp axis beside cp ranks, while what these run is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autofunc.spreading import along, axis_named
from autofunc.spreading.movements import gather


class _PutTogether:
    """An axis that hands out values that are cut as a whole: what is recorded are plain tensors, and no DTensors."""

    def __init__(self, name: str) -> None:
        self._name, self._axis = name, axis_named(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._axis, name)

    def handed_out(self, x: Tensor, dim: int) -> Tensor:
        """See `Axis.handed_out`."""
        return gather(x, self._name, dim, (x.shape[dim] * self._axis.size,))


@contextmanager
def putting_together(axis: str | None) -> Iterator[None]:
    """Whatever an axis hands out is whole; None where there is none."""
    if axis is None:
        yield
        return
    with along({axis: _PutTogether(axis)}):
        yield
