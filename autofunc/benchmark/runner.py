"""The interface of a contender that was built, whichever side it is on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from autofunc.schedule import Timeline


class Alive(NamedTuple):
    """Most bytes alive between actions, by pp rank."""

    measured: tuple[int, ...]
    predicted: tuple[int, ...] | None  # None: a size depends on data


class Runner(Protocol):
    """A contender on one process. All processes of its team make the same calls."""

    def step(self) -> None:
        """Compute the loss and the gradients, after releasing those of the step before."""
        ...

    def drop(self) -> None:
        """Release the results of the last step."""
        ...

    def grads(self) -> Mapping[str, Tensor]:
        """Return this process's gradients of the last step, by canonical path."""
        ...

    def paths(self) -> set[str]:
        """Return the canonical paths of the parameters that this process trains."""
        ...

    def buffer_bytes(self) -> int:
        """Return the bytes of receive buffers that are kept from step to step."""
        ...

    def timeline(self) -> Timeline | None:
        """Return a measured step; in one process, a simulation with measured costs. None if there is none."""
        ...

    def alive(self) -> Alive | None:
        """Return the bytes alive between actions; None if only the allocator knows."""
        ...

    def close(self) -> None:
        """Release what was built."""
        ...


class Bystander:
    """Stands in for a contender on processes outside its team."""

    def step(self) -> None:
        """See `Runner`."""

    def drop(self) -> None:
        """See `Runner`."""

    def grads(self) -> Mapping[str, Tensor]:
        """See `Runner`."""
        return {}

    def paths(self) -> set[str]:
        """See `Runner`."""
        return set()

    def buffer_bytes(self) -> int:
        """See `Runner`."""
        return 0

    def timeline(self) -> Timeline | None:
        """See `Runner`."""
        return None

    def alive(self) -> Alive | None:
        """See `Runner`."""
        return None

    def close(self) -> None:
        """See `Runner`."""
