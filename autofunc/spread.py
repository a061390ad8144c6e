"""Where activations lie on processes that compute a stage together, and rows on those that run it in parallel.

On one process this is a no-op. While a stage runs or is captured on several, the engine installs a `Spread`, a `DataSum`
and an `ExpertExchange`. A model declares by `af.constrain` how its values are placed, and the `Spread` moves them. Moving
changes where values are, never what they are.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Protocol, TypeVar

from torch import Tensor

from autofunc.errors import ModelError

T = TypeVar("T")

SEQUENCE_DIM = 1
"""The dim of (rows, tokens, features) that "sequence" refers to."""


class Spread(Protocol):
    """Moves values between the processes that compute a stage together."""

    def constrain(self, x: Tensor, placement: str) -> Tensor:
        """See `constrain`."""
        ...

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Return the summed cross-entropy of logits cut along the vocabulary; None if they are not cut."""
        ...


class DataSum(Protocol):
    """Sums values over the processes that run the same stage on other rows."""

    @property
    def size(self) -> int:
        """Number of these processes."""
        ...

    @property
    def fingerprint(self) -> Hashable:
        """Equal if the processes are the same."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum all processes' values for the same microbatch; differentiable."""
        ...


class ExpertExchange(Protocol):
    """Sends rows between the processes that share a layer's experts, each of which has different tokens.

    With E experts, `size` processes and S rows on each, process r holds the E / size experts from `r * E / size`.
    """

    @property
    def size(self) -> int:
        """Number of these processes."""
        ...

    @property
    def fingerprint(self) -> Hashable:
        """Equal if the processes are the same."""
        ...

    def counts(self, own: Tensor) -> Tensor:
        """Gather all processes' row counts per expert: int64 (E,) -> (size, E)."""
        ...

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows, (S, width), sorted by expert, to the processes that hold the experts; differentiable.

        Returns:
            (size * S, width): the received rows, sorted by expert, then by sender, followed by zeros; and the number of
            rows per local expert, int64 (E / size,).
        """
        ...

    def combine(self, made: Tensor, counts: Tensor, rows: int) -> Tensor:
        """Reverse `dispatch`: return computed rows, (size * S, any), to their senders, (S, any), in the original order."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Average a statistic of a microbatch's tokens over the processes that see different rows; differentiable.

        The mean over all tokens that the processes route: `x` itself if they share all rows, each with its tokens, because
        then `x` is already that of whole rows.
        """
        ...


_data: ContextVar[DataSum | None] = ContextVar("data", default=None)
_experts: ContextVar[ExpertExchange | None] = ContextVar("experts", default=None)


@contextmanager
def _installed(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def summing(data: DataSum | None) -> AbstractContextManager[None]:
    """Install a `DataSum` for this context; None if this process has all rows."""
    return _installed(_data, data)


def current_data() -> DataSum | None:
    """Return the installed `DataSum`; None if this process has all rows."""
    return _data.get()


def exchanging(experts: ExpertExchange | None) -> AbstractContextManager[None]:
    """Install an `ExpertExchange` for this context; None if this process has all experts."""
    return _installed(_experts, experts)


def current_experts() -> ExpertExchange | None:
    """Return the installed `ExpertExchange`; None if this process has all experts."""
    return _experts.get()


_spread: ContextVar[Spread | None] = ContextVar("spread", default=None)


def spreading(spread: Spread) -> AbstractContextManager[None]:
    """Install a `Spread` for this context."""
    return _installed(_spread, spread)


def current_spread() -> Spread | None:
    """Return the installed `Spread`; None on one process."""
    return _spread.get()


def constrain(x: Tensor, placement: str) -> Tensor:
    """Declare how an activation lies over the tp axis: a no-op on one process; under tp the active `Spread` moves it.

    Without it, each operator chooses the placement of its result, and sums whose parts are on several ranks may be
    exchanged more than once. A transformer block needs four: a branch begins with the whole stream (`"replicate"`), and at
    its end the parts are summed into the stream (`"sequence"`).

    Args:
        x: a tensor of any shape.
        placement: "replicate": every rank has all of it; "shard(d)": each has its part of dim d; "sequence": its part of
            the tokens (dim 1) with sequence parallelism, all of it without.

    Returns:
        A tensor of the same global shape and dtype.

    Raises:
        ModelError: for an unknown placement, or a dim that does not divide.

    Example:
        h = af.constrain(layer_norm(params["ln"], x), "replicate")
        x = x + af.constrain(linear(params["proj"], attention(h)), "sequence")
    """
    if placement != "sequence":
        sharded_dim(placement)
    spread = _spread.get()
    return x if spread is None else spread.constrain(x, placement)


@lru_cache
def sharded_dim(placement: str) -> int | None:
    """Return the dim that a placement cuts: `"shard(1)"` is 1, `"replicate"` is None.

    Raises:
        ModelError: for anything else.
    """
    found = re.fullmatch(r"\s*shard\(\s*(\d+)\s*\)\s*", placement) if isinstance(placement, str) else None
    if found:
        return int(found[1])
    if placement == "replicate":
        return None
    raise ModelError(f"unknown placement {placement!r}; expected 'replicate' or 'shard(0)', 'shard(1)', ...")
