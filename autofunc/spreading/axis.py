"""An axis of the mesh as the operators of a graph see it: who is beside this process, and how they exchange values.

A graph names its axis ("tp"); which processes these are is known while it runs or is captured, when the engine puts an
`Axis` in charge. So equal pieces are equal whatever group they run in.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from autofunc.errors import ModelError


class Axis(Protocol):
    """The processes along an axis, of which this is one. All of them call each method, with tensors of one shape."""

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    @property
    def rank(self) -> int:
        """Which of them this is."""
        ...

    @property
    def fingerprint(self) -> Hashable:
        """Equal where these are the same processes, and this the same of them."""
        ...

    def all_reduce(self, x: Tensor, how: str) -> Tensor:
        """Everyone's `x`: their "sum", or the "max" of each element. Not differentiable, as all of these."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Everyone's `x`, one after the other along dim 0."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's part, of equal ones along dim 0, of the sum of everyone's `x`."""
        ...

    def handed_out(self, x: Tensor, dim: int) -> Tensor:
        """What is returned of a value that is cut along a dim: all, or what a loss may take parts of; differentiable."""
        ...


_axes: ContextVar[Mapping[str, Axis]] = ContextVar("axes", default={})  # noqa: B039  (never written to)


@contextmanager
def along(axes: Mapping[str, Axis]) -> Iterator[None]:
    """Put axes in charge, by name, beside those that are."""
    token = _axes.set({**_axes.get(), **axes})
    try:
        yield
    finally:
        _axes.reset(token)


def axis_named(name: str) -> Axis:
    """The axis in charge.

    Raises:
        ModelError: when there is none of this name.
    """
    axis = _axes.get().get(name)
    if axis is None:
        raise ModelError(f"a layer that is cut over the {name} axis runs where no such axis is in charge")
    return axis
