"""A contender that was built: what the measuring asks of it, whichever side it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from autofunc.schedule import Timeline


class Alive(NamedTuple):
    """Most bytes that are alive between actions, by pp rank."""

    measured: tuple[int, ...]
    predicted: tuple[int, ...] | None  # None: a size depends on data


class Runner(Protocol):
    """A contender on one process. All processes of its team call its methods alike."""

    def step(self) -> None:
        """Work out the loss and the gradients; those of the step before are let go of first."""
        ...

    def drop(self) -> None:
        """Let go of what the last step made."""
        ...

    def grads(self) -> Mapping[str, Tensor]:
        """The gradients of the last step that this process has, by canonical path."""
        ...

    def paths(self) -> set[str]:
        """Of the parameters that this process trains."""
        ...

    def buffer_bytes(self) -> int:
        """What stays from step to step to receive into."""
        ...

    def timeline(self) -> Timeline | None:
        """A measured step; in one process one that is simulated with measured costs. None: there is none."""
        ...

    def alive(self) -> Alive | None:
        """What is alive between actions; None: only the allocator knows."""
        ...

    def close(self) -> None:
        """Let go of what was built."""
        ...


class Bystander:
    """In the place of a contender in whose team this process is not."""

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
