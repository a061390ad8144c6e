"""What crosses the boundaries between stages, as data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.schedule import Edge
from autofunc.splitting.setting import WHOLE, Partitioning


@dataclass(frozen=True)
class Value:
    """One tensor of what a stage hands on for one microbatch: this process's part of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool
    placement: Hashable = None  # how it lies over the processes that compute the stage together; None: whole on each
    producer: int = 0  # the stage that makes it

    @property
    def num_bytes(self) -> int:
        """Bytes of one microbatch's tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Boundary:
    """What a stage returns: a pytree whose tensors are values and whose other leaves are constants."""

    spec: tree.TreeSpec
    leaves: tuple[Any, ...]  # a Value, or the constant itself

    @property
    def values(self) -> tuple[Value, ...]:
        """The tensors, in leaf order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Value))

    def of(self, producer: int) -> Boundary:
        """The same as the stage with this number returns it."""
        leaves = (replace(leaf, producer=producer) if isinstance(leaf, Value) else leaf for leaf in self.leaves)
        return Boundary(self.spec, tuple(leaves))

    @property
    def num_bytes(self) -> int:
        """Bytes of one microbatch."""
        return sum(value.num_bytes for value in self.values)

    def tensors(self, x: Any, partitioning: Partitioning = WHOLE) -> list[Tensor]:
        """Flatten what the stage returned into its tensors, as they are handed on."""
        leaves = [leaf for leaf in tree.leaves_and_spec(x)[0] if isinstance(leaf, Tensor)]
        return [
            partitioning.whole(leaf) if value.placement is None else partitioning.handed_on(leaf, value.placement)[0]
            for leaf, value in zip(leaves, self.values, strict=True)
        ]

    def assemble(self, tensors: Sequence[Tensor], partitioning: Partitioning = WHOLE) -> Any:
        """Inverse of `tensors`: put the constants back."""
        remaining = iter(tensors)
        leaves = [
            partitioning.received(next(remaining), leaf.placement) if isinstance(leaf, Value) else leaf
            for leaf in self.leaves
        ]
        return tree.from_leaves(leaves, self.spec)


@dataclass(frozen=True)
class Returned:
    """What one stage returns, and what the loss makes of it."""

    boundary: Boundary
    aux: Boundary | None = None  # of one microbatch; None when there is no loss, or it has no aux

    def of(self, producer: int) -> Returned:
        """The same as the stage with this number returns it."""
        return Returned(self.boundary.of(producer), self.aux.of(producer) if self.aux is not None else None)


@dataclass(frozen=True)
class Boundaries:
    """What every stage returns for one batch signature, and what the loss makes of the last."""

    stages: tuple[Boundary, ...]  # one per stage; the last is the model's output
    aux: Boundary | None  # of one microbatch; None when there is no loss, or it has no aux

    def edges(self) -> tuple[Edge, ...]:
        """The connections between stages; `needs_grad` where any of the values does."""
        return tuple(
            Edge(index, index + 1, any(value.needs_grad for value in boundary.values))
            for index, boundary in enumerate(self.stages[:-1])
        )


def describe(x: Any, partitioning: Partitioning = WHOLE) -> tuple[Boundary, list[Tensor]]:
    """What a stage returned as a boundary, and its tensors as this process hands them on, with their graphs.

    Args:
        x: what its function returned.
        partitioning: how values lie over the processes that compute it together.
    """
    leaves, spec = tree.leaves_and_spec(x)
    described: list[Any] = []
    tensors: list[Tensor] = []
    for name, leaf in zip(tree.leaf_names(x, "x"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            described.append(leaf)
            continue
        local, placement = partitioning.handed_on(leaf)
        described.append(Value(name, tuple(local.shape), local.dtype, local.requires_grad, placement))
        tensors.append(local)
    return Boundary(spec, tuple(described)), tensors


def outline(x: Any) -> Boundary:
    """What a stage returned, all of it, as a boundary; nothing is computed. A value in parts has the shape of the whole."""
    leaves, spec = tree.leaves_and_spec(x)
    named = zip(tree.leaf_names(x, "x"), leaves, strict=True)
    return Boundary(
        spec,
        tuple(
            Value(name, tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for name, leaf in named
        ),
    )
