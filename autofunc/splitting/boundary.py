"""The values that cross the boundaries between stages, as data."""

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
    """One tensor that a stage sends for one microbatch: this process's part of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool
    placement: Hashable = None  # how it lies over the processes that compute the stage together; None: whole on each
    producer: int = 0  # the number of the stage that makes it

    @property
    def num_bytes(self) -> int:
        """Bytes of one microbatch's tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Boundary:
    """A stage's output: a pytree whose tensors are `Value`s and whose other leaves are constants."""

    spec: tree.TreeSpec
    leaves: tuple[Any, ...]  # a Value, or the constant itself

    @property
    def values(self) -> tuple[Value, ...]:
        """The tensors, in leaf order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Value))

    def of(self, producer: int) -> Boundary:
        """Return the same boundary, as the output of the stage with this number."""
        leaves = (replace(leaf, producer=producer) if isinstance(leaf, Value) else leaf for leaf in self.leaves)
        return Boundary(self.spec, tuple(leaves))

    @property
    def num_bytes(self) -> int:
        """Bytes of one microbatch."""
        return sum(value.num_bytes for value in self.values)

    def tensors(self, x: Any, partitioning: Partitioning = WHOLE) -> list[Tensor]:
        """Flatten a stage's output into its tensors, as they are sent on."""
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
    """The outputs of one stage and of its loss."""

    boundary: Boundary
    aux: Boundary | None = None  # of one microbatch; None without a loss, or if the loss has no aux

    def of(self, producer: int) -> Returned:
        """Return the same, as returned by the stage with this number."""
        return Returned(self.boundary.of(producer), self.aux.of(producer) if self.aux is not None else None)


@dataclass(frozen=True)
class Boundaries:
    """The outputs of every stage for one batch signature, and of the loss."""

    stages: tuple[Boundary, ...]  # one per stage; the last is the model's output
    aux: Boundary | None  # of one microbatch; None without a loss, or if the loss has no aux

    def edges(self) -> tuple[Edge, ...]:
        """Return the edges between stages; `needs_grad` if any of their values does."""
        return tuple(
            Edge(index, index + 1, any(value.needs_grad for value in boundary.values))
            for index, boundary in enumerate(self.stages[:-1])
        )


def describe(x: Any, partitioning: Partitioning = WHOLE) -> tuple[Boundary, list[Tensor]]:
    """Describe a stage's output as a boundary; return it, and the tensors this process sends on, with their autograd graph.

    Args:
        x: the output of the stage's function.
        partitioning: how values lie over the processes that compute the stage together.
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
    """Describe a stage's whole output as a boundary, without computing; a partitioned value gets its whole shape."""
    leaves, spec = tree.leaves_and_spec(x)
    named = zip(tree.leaf_names(x, "x"), leaves, strict=True)
    return Boundary(
        spec,
        tuple(
            Value(name, tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for name, leaf in named
        ),
    )
