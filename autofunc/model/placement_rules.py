"""Placement tables: how a model's parameters are sharded over the tp axis, as plain data beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from autofunc import tree
from autofunc.errors import MeshError, ModelError, divisors, one_of
from autofunc.spread import sharded_dim


@dataclass(frozen=True)
class TensorParallel:
    """How a model is sharded over the tp axis. The model's functions do not change.

    Args:
        params: shell-style pattern of parameter paths (`*` crosses dots) -> "shard(d)" or "replicate". The first matching
            pattern applies; parameters without one are whole on every rank.
        divisible: further numbers, by name, that the number of tp ranks must divide, such as `{"n_head": 12}`.

    Raises:
        ModelError: for an unknown placement.
    """

    params: Mapping[str, str]
    divisible: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, placement in self.params.items():
            try:
                sharded_dim(placement)
            except ModelError as error:
                raise ModelError(f"tensor parallel table, {pattern!r}: {error}") from error

    def placement(self, path: str) -> str:
        """Return a parameter's placement, by its canonical path."""
        return next((each for pattern, each in self.params.items() if tree.matches(path, [pattern])), "replicate")


def cut_dims(table: TensorParallel, spec: Mapping[str, torch.Tensor], size: int) -> dict[str, int]:
    """Return the dim along which each parameter is cut; whole parameters are omitted.

    Args:
        table: of the model.
        spec: canonical path -> a tensor of its shape.
        size: number of tp ranks.

    Raises:
        ModelError: for a pattern that matches no parameter, or a dim that a parameter does not have.
        MeshError: if the number of ranks does not divide something it has to.
    """
    for pattern in table.params:
        if not any(tree.matches(path, [pattern]) for path in spec):
            raise ModelError(
                f"tensor parallel table: {pattern!r} matches no parameter; {one_of(pattern, patterns_like(pattern, spec))}"
            )
    for name, number in table.divisible.items():
        if number % size:
            raise MeshError(f"tp={size} does not divide {name}={number}; {_fitting(number)}")
    dims: dict[str, int] = {}
    for path, leaf in spec.items():
        placement = table.placement(path)
        dim = sharded_dim(placement)
        if dim is None:
            continue
        if dim >= leaf.dim():
            nearest = f"'shard({leaf.dim() - 1})'" if leaf.dim() else "'replicate'"
            raise ModelError(
                f"tensor parallel table: {placement} for {path!r}, which has shape {tuple(leaf.shape)}; use {nearest}"
            )
        if leaf.shape[dim] % size:
            raise MeshError(
                f"tp={size} does not divide dim {dim} of parameter {path!r}, which has shape {tuple(leaf.shape)}; "
                + _fitting(leaf.shape[dim])
            )
        dims[path] = dim
    return dims


def patterns_like(given: str, spec: Mapping[str, torch.Tensor]) -> list[str]:
    """Return patterns for all parameters, in the form of the given one: `h.*.attn.q.weight` or `*.q.weight`."""
    if given.startswith("*"):
        parts = [path.split(".") for path in spec]
        return list(dict.fromkeys(".".join(each if len(each) < 3 else ["*", *each[-2:]]) for each in parts))
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in path.split(".")) for path in spec))


def _fitting(number: int) -> str:
    return f"sizes that do: {', '.join(divisors(number, 64)[:12])}"
