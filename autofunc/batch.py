"""From a batch to its microbatches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import BatchError
from autofunc.random import as_key, fold_in

Microbatch = dict[str, Any]


def split_batch(
    batch: Mapping[str, Any],
    num_microbatches: int,
    *,
    key: Any = None,
    batch_dims: Mapping[str, int | None] | None = None,
    first: int = 0,
) -> list[Microbatch]:
    """Cut a batch into microbatches of equal size, in order. Tensors are views, nothing is copied.

    The batch size is the size of dim 0 that most tensors share. Tensors whose dim 0 is the batch size are cut along it;
    all other leaves go to every microbatch. `batch_dims` says otherwise for an entry: a dim to cut along,
    or None for all rows.

    Args:
        batch: mapping of pytrees of tensors. Its `"key"`, when there is one, is the key.
        num_microbatches: how many; must divide the batch size.
        key: randomness of this step: None, (seed, step), or a tensor from `af.random.make_key`. Each microbatch gets its
            own key, folded from this one and its number.
        batch_dims: key -> dim or None.
        first: number of the first microbatch among those of all data parallel ranks.

    Raises:
        BatchError: when there is nothing to cut, the batch size is ambiguous, or rows do not divide.
    """
    batch_dims = dict(batch_dims or {})
    unknown = sorted(set(batch_dims) - set(batch))
    if unknown:
        raise BatchError(f"batch_dims names {unknown[0]!r}, which is not in the batch: {', '.join(map(str, batch))}")
    rows = _batch_size(batch, batch_dims)
    if rows % num_microbatches:
        fitting = [count for count in range(1, rows + 1) if rows % count == 0]
        raise BatchError(
            f"a batch of {rows} rows cannot be cut into {num_microbatches} equal microbatches; "
            f"{rows} rows can be cut into {', '.join(map(str, fitting[:12]))}"
        )
    pieces: list[Microbatch] = [{} for _ in range(num_microbatches)]
    for name, value in batch.items():
        if name == "key":
            continue
        leaves, spec = tree.leaves_and_spec(value)
        cut = [_cut(leaf, name, rows, num_microbatches, batch_dims) for leaf in leaves]
        for index, piece in enumerate(pieces):
            piece[name] = tree.from_leaves([leaf[index] for leaf in cut], spec)
    step_key = as_key(batch.get("key") if key is None else key, device=_device(batch))
    if step_key is not None:
        keys = fold_in(step_key, torch.arange(first, first + num_microbatches, device=step_key.device))
        for piece, microbatch_key in zip(pieces, keys.unbind(), strict=True):
            piece["key"] = microbatch_key
    return pieces


def _batch_size(batch: Mapping[str, Any], batch_dims: Mapping[str, int | None]) -> int:
    """The size of the batch dim that most tensors share."""
    names: dict[int, list[str]] = {}
    for name, value in batch.items():
        dim = batch_dims.get(name, 0)
        if name == "key" or dim is None:
            continue
        for leaf in tree.leaves_and_spec(value)[0]:
            if isinstance(leaf, Tensor) and leaf.dim() > dim:
                names.setdefault(leaf.shape[dim], []).append(str(name))
    if not names:
        raise BatchError(f"nothing in the batch has rows to cut: {', '.join(map(str, batch)) or 'it is empty'}")
    (rows, sharing), *others = sorted(names.items(), key=lambda item: -len(item[1]))
    if others and len(others[0][1]) == len(sharing):
        raise BatchError(
            f"cannot tell the batch size: {sharing[0]!r} has {rows} rows and {others[0][1][0]!r} has {others[0][0]}; "
            f"say batch_dims={{{others[0][1][0]!r}: None}} for what every microbatch gets whole"
        )
    if rows == 0:
        raise BatchError(f"the batch has no rows: {sharing[0]!r} is empty")
    return rows


def _cut(leaf: Any, name: str, rows: int, count: int, batch_dims: Mapping[str, int | None]) -> list[Any]:
    dim = batch_dims.get(name, 0)
    if dim is None or not isinstance(leaf, Tensor) or leaf.dim() <= dim:
        return [leaf] * count
    if leaf.shape[dim] != rows:
        if name in batch_dims:
            raise BatchError(f"batch[{name!r}] has {leaf.shape[dim]} rows in dim {dim}, but the batch has {rows}")
        return [leaf] * count
    return list(torch.split(leaf, rows // count, dim))


def _device(batch: Mapping[str, Any]) -> torch.device:
    leaves = tree.leaves_and_spec({name: value for name, value in batch.items() if name != "key"})[0]
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))


def signature(microbatch: Microbatch) -> Any:
    """What a plan depends on: shapes, dtypes and devices of tensors, and the values of everything else.

    Raises:
        BatchError: for a leaf that cannot be compared by value, such as a numpy array.
    """
    leaves, spec = tree.leaves_and_spec(microbatch)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, Hashable)):
            raise BatchError(
                f"the batch holds a {type(leaf).__name__}; expected tensors (torch.from_numpy) or plain values"
            )
    # with their types: True, 1 and 1.0 are equal
    return spec, tuple(
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    )
