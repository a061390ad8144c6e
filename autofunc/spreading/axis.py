"""An axis of the mesh as the operators of a graph see it: the processes beside this one, and their collectives.

A graph names its axis ("tp"). While it runs or is captured, the engine installs the `Axis` behind the name, so equal pieces
are equal in any process group.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor

from autofunc.errors import ModelError


class Axis(Protocol):
    """The processes along an axis. All of them call each method together, with tensors of the same shape."""

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    @property
    def rank(self) -> int:
        """This process's index among them, from 0."""
        ...

    @property
    def fingerprint(self) -> Hashable:
        """Equal for the same processes and the same rank among them."""
        ...

    def all_reduce(self, x: Tensor, how: str) -> Tensor:
        """Reduce everyone's `x` by "sum" or elementwise "max". Not differentiable; nor are the next two."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate everyone's `x` along dim 0."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum everyone's `x`, and return this rank's part of equal parts along dim 0."""
        ...

    def handed_out(self, x: Tensor, dim: int) -> Tensor:
        """Return a value cut along a dim to the caller of the forward: whole, or in a form whose parts a loss can use;
        differentiable."""
        ...


_axes: ContextVar[Mapping[str, Axis]] = ContextVar("axes", default={})  # noqa: B039  (never written to)


@contextmanager
def along(axes: Mapping[str, Axis]) -> Iterator[None]:
    """Install axes by name, next to those already installed."""
    token = _axes.set({**_axes.get(), **axes})
    try:
        yield
    finally:
        _axes.reset(token)


def axis_named(name: str) -> Axis:
    """Return the installed axis of this name.

    Raises:
        ModelError: if there is none.
    """
    axis = _axes.get().get(name)
    if axis is None:
        raise ModelError(f"a layer cut over the {name} axis runs outside of that axis")
    return axis
