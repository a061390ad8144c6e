"""The surroundings of a stage's function: how its values lie over processes, and the precision it computes in.

The function itself is the same everywhere. Outside it, all tensors are local: those this process holds, sends and receives.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from autofunc import tree
from autofunc.context_parallel.axis import ContextAxis
from autofunc.spread import DataSum, ExpertExchange


class Partitioning(Protocol):
    """How the values of a stage lie over the processes that compute it together. Paths are those of holders."""

    @property
    def over(self) -> Hashable:
        """How processes compute the model together, see `Model.over_ranks`; None if the model knows nothing of them."""
        ...

    @property
    def over_tp(self) -> bool:
        """Whether tp ranks compute each layer together."""
        ...

    @property
    def fingerprint(self) -> Hashable:
        """A key of what shapes and placements do not show: which processes, and how they exchange values."""
        ...

    def shape(self, path: str, shape: torch.Size) -> torch.Size:
        """Return the shape of this process's part of a parameter, given the shape of the whole."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Return the context in which the stage, and its gradient, run or are captured."""
        ...

    def parameter(self, path: str, local: Tensor) -> Tensor:
        """Return a parameter as the stage's function sees it: a leaf sharing memory with `local`, this process's part."""
        ...

    def received(self, local: Tensor, placement: Hashable) -> Tensor:
        """Return a value from the stage before, as the function sees it; differentiable.

        Args:
            local: this process's part.
            placement: the one that `handed_on` returned in the stage before; None for a value that is the same everywhere.
        """
        ...

    def handed_on(self, value: Tensor, placement: Hashable = None) -> tuple[Tensor, Hashable]:
        """Return this process's part of a value made by the function, and its placement; differentiable.

        The value is moved to `placement` if one is given; otherwise it keeps its own.
        """
        ...

    def whole(self, value: Tensor) -> Tensor:
        """Return the whole of a value made by the function; differentiable."""
        ...

    def gradient(self, path: str, gradient: Tensor) -> tuple[Tensor, bool]:
        """Return this process's part of a parameter's gradient, and whether it is one of several terms still to sum."""
        ...

    def refine(self, graph: fx.Graph) -> None:
        """Choose how the exchanges in a captured graph are made; changes the graph in place."""
        ...


class Whole:
    """A `Partitioning` over one process: values are used as they are."""

    over_tp = False
    fingerprint: Hashable = "whole"
    over: Hashable = None

    def shape(self, path: str, shape: torch.Size) -> torch.Size:
        """See `Partitioning.shape`."""
        return shape

    def running(self) -> AbstractContextManager[None]:
        """See `Partitioning.running`."""
        return nullcontext()

    def parameter(self, path: str, local: Tensor) -> Tensor:
        """See `Partitioning.parameter`."""
        return local.detach()

    def received(self, local: Tensor, placement: Hashable) -> Tensor:
        """See `Partitioning.received`."""
        return local

    def handed_on(self, value: Tensor, placement: Hashable = None) -> tuple[Tensor, Hashable]:
        """See `Partitioning.handed_on`."""
        return value, None

    def whole(self, value: Tensor) -> Tensor:
        """See `Partitioning.whole`."""
        return value

    def gradient(self, path: str, gradient: Tensor) -> tuple[Tensor, bool]:
        """See `Partitioning.gradient`."""
        return gradient, False

    def refine(self, graph: fx.Graph) -> None:
        """See `Partitioning.refine`."""


WHOLE = Whole()


@dataclass(frozen=True)
class Precision:
    """The floating-point dtypes that a stage computes in; None leaves a dtype unchanged.

    Args:
        param_dtype: of the parameters as layers see them, and so of activations.
        output_dtype: of the last layer's outputs, as the loss sees them.
        cast_batch: whether layers see the batch's floating-point entries in `param_dtype`; the loss sees them unchanged.
    """

    param_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_batch: bool = True

    def parameter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a parameter of this dtype is computed in."""
        return dtype if self.param_dtype is None or not dtype.is_floating_point else self.param_dtype

    def batch(self, microbatch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the microbatch as layers see it."""
        if self.param_dtype is None or not self.cast_batch:
            return microbatch
        return tree.map_leaves(lambda leaf: _cast(leaf, self.param_dtype), dict(microbatch))  # type: ignore[no-any-return]

    def output(self, x: Any) -> Any:
        """Return the last layer's output as the loss sees it."""
        return x if self.output_dtype is None else tree.map_leaves(lambda leaf: _cast(leaf, self.output_dtype), x)


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@dataclass(frozen=True)
class Setting:
    """The surroundings of a stage's function."""

    partitioning: Partitioning = WHOLE
    precision: Precision = Precision()
    data: DataSum | None = None  # sums over the processes with other rows; None if there are none
    experts: ExpertExchange | None = None  # exchanges with processes that have other experts; None if this one has all
    arrive_by_layer: bool = False  # whether a forward may begin while parameters of its later layers are still arriving
    context: ContextAxis | None = None  # the processes that share the tokens of the same rows; None if this one has all


ALONE = Setting()
"""One process, with every value in the precision it has."""
