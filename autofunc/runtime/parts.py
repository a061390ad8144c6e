"""A batch whose rows do not divide into equal microbatches, run in two parts: checks before, joining after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.batch import COUNTS, Microbatch, Parts
from autofunc.errors import BatchError
from autofunc.losses import Loss, combine_aux
from autofunc.mesh import DATA_AXES, data_coordinate, same_over
from autofunc.runtime.finish import mean
from autofunc.runtime.step import StepResult


def check_same_parts(mesh: DeviceMesh | None, parts: Parts, device: torch.device) -> None:
    """Refuse batches that data parallel ranks cut into different numbers of microbatches; all processes call it.

    Ranks would gather and reduce different numbers of times, and then wait for each other or mix up steps. Ranks of one
    pipeline have the same rows: see `agree`.

    Args:
        mesh: of the pipeline; None means a single process.
        parts: of this rank's batch.
        device: for the exchange of numbers.

    Raises:
        BatchError: on all ranks, if they differ.
    """
    if data_coordinate(mesh)[1] > 1 and not same_over(mesh, DATA_AXES, 2 * len(parts.whole) + len(parts.rest), device):
        raise BatchError(
            f"the data parallel ranks cut their rows into different numbers of microbatches: the {parts.rows} rows here "
            f"make {len(parts.whole)} of equal size{' and one of the rest' * len(parts.rest)}; give all ranks equally many "
            "rows"
        )


def counted(parts: Parts, device: torch.device) -> list[Microbatch]:
    """Return the rest's microbatches with the weight of their rows, where a whole microbatch weighs 1."""
    return [{**each, COUNTS: torch.full((1,), parts.share, device=device)} for each in parts.rest]


def joined(parts: Sequence[StepResult], loss: Loss | None, weights: Sequence[float]) -> StepResult:
    """Join the results of a batch's parts, without gradients; the first part's result is modified and returned.

    Args:
        parts: in order.
        loss: of the pipeline.
        weights: of the parts in a mean.
    """
    first, *others = parts
    for other in others:
        first.outputs = _rows_of_both(first.outputs, other.outputs)
    if others and first.aux is not None:
        first.aux = combine_aux(loss, [part.aux for part in parts], weights)
    if first.total is not None and first.weight is not None:
        for other in others:
            assert other.total is not None and other.weight is not None, "parts end alike"
            first.total, first.weight = first.total + other.total, first.weight + other.weight
        first.loss = mean(first.total, first.weight, loss)
    return first


def _rows_of_both(first: Any, other: Any) -> Any:
    """Concatenate outputs in dim 0, leaf by leaf; leaves that are not tensors come from the first."""
    leaves, spec = tree.leaves_and_spec(first)
    others = tree.leaves_and_spec(other)[0]
    together = [
        torch.cat([leaf, more]) if isinstance(leaf, Tensor) else leaf for leaf, more in zip(leaves, others, strict=True)
    ]
    return tree.from_leaves(together, spec)
