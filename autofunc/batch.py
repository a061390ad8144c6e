"""Cut a batch into microbatches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import BatchError
from autofunc.random import KEY, as_key, fold_in
from autofunc.row_dims import BatchDims, row_dims

Microbatch = dict[str, Any]

COUNTS = "row counts"
"""An entry that models do not see, fp32 of shape (rows,): each row's weight in the loss, 0 for padding rows."""


class Parts(NamedTuple):
    """A batch of any number of rows, cut."""

    whole: list[Microbatch]  # of equal size
    rest: list[Microbatch]  # at most one, with the remaining rows
    rows: int  # of the batch
    share: float  # the rest's rows over those of a whole microbatch


def split_batch(
    batch: Mapping[str, Any],
    num_microbatches: int,
    *,
    key: Any = None,
    batch_dims: BatchDims = None,
    first: int = 0,
    key_name: str = KEY,
) -> list[Microbatch]:
    """Cut a batch into microbatches of equal size, in order. Tensors become views; nothing is copied.

    Tensors are cut along the dim that `row_dims` finds; every microbatch gets all other leaves whole.

    Args:
        batch: mapping of pytrees of tensors.
        num_microbatches: must divide the batch size.
        key: randomness of this step: None, (seed, step), or a tensor from `af.random.make_key`. Each microbatch gets its
            own key, folded from this one and its number.
        batch_dims: see `row_dims`.
        first: number of the first microbatch among those of all data parallel ranks.
        key_name: entry of the key, in the batch and in each microbatch: the model's `key_name`.

    Raises:
        BatchError: if nothing has rows, the rows' dim is ambiguous, or the rows do not divide.
    """
    rows, dims = row_dims(batch, batch_dims, cuts=num_microbatches > 1, key_name=key_name)
    if rows % num_microbatches:
        fitting = [count for count in range(1, rows + 1) if rows % count == 0]
        raise BatchError(
            f"a batch of {rows} rows cannot be cut into {num_microbatches} equal microbatches; "
            f"{rows} rows can be cut into {', '.join(map(str, fitting[:12]))}"
        )
    numbers = range(first, first + num_microbatches)
    return _pieces(batch, dims, rows, _Stretch(0, rows // num_microbatches, num_microbatches), numbers, key, key_name)


def split_any_rows(
    batch: Mapping[str, Any],
    num_microbatches: int,
    *,
    key: Any = None,
    batch_dims: BatchDims = None,
    place: tuple[int, int] = (0, 1),
    key_name: str = KEY,
) -> Parts:
    """Cut a batch of any number of rows into microbatches of equal size, plus one with the remaining rows.

    No microbatch repeats a row, so each result is the model's result for rows of the batch.

    Args:
        batch: see `split_batch`.
        num_microbatches: maximum; the microbatch size is the smallest that needs no more.
        key: see `split_batch`.
        batch_dims: see `row_dims`.
        place: (this data parallel place, number of places).
        key_name: see `split_batch`.

    Raises:
        BatchError: if nothing has rows, or the rows' dim is ambiguous.
    """
    rows, dims = row_dims(batch, batch_dims, cuts=num_microbatches > 1, key_name=key_name)
    size = -(-rows // num_microbatches)
    whole, left = divmod(rows, size)
    first, after_all = place[0] * num_microbatches, place[1] * num_microbatches + place[0]
    made = _pieces(batch, dims, rows, _Stretch(0, size, whole), range(first, first + whole), key, key_name)
    stretch, numbers = _Stretch(whole * size, left, 1), range(after_all, after_all + 1)
    rest = _pieces(batch, dims, rows, stretch, numbers, key, key_name) if left else []
    return Parts(made, rest, rows, left / size)


class _Stretch(NamedTuple):
    """Rows to be cut into microbatches of one size."""

    start: int
    size: int
    number: int


def _pieces(
    batch: Mapping[str, Any], dims: Mapping[str, list[int | None]], rows: int, stretch: _Stretch, numbers: range, key: Any,
    key_name: str,
) -> list[Microbatch]:  # fmt: skip
    """Return the microbatches of a stretch; `numbers` are folded into their keys."""
    pieces: list[Microbatch] = [{} for _ in numbers]
    for name, value in batch.items():
        if name == key_name:
            continue
        leaves, spec = tree.leaves_and_spec(value)
        cut = [_cut(leaf, dim, rows, stretch) for leaf, dim in zip(leaves, dims[name], strict=True)]
        for index, piece in enumerate(pieces):
            piece[name] = tree.from_leaves([leaf[index] for leaf in cut], spec)
    step_key = as_key(batch.get(key_name) if key is None else key, device=_device(batch, key_name))
    if step_key is not None:
        keys = fold_in(step_key, torch.tensor(numbers, device=step_key.device))
        for piece, microbatch_key in zip(pieces, keys.unbind(), strict=True):
            piece[key_name] = microbatch_key
    return pieces


def _cut(leaf: Any, dim: int | None, rows: int, stretch: _Stretch) -> list[Any]:
    if dim is None:
        return [leaf] * stretch.number
    each = leaf.shape[dim] // rows  # more than one if the caller declared so
    if stretch.number * stretch.size < rows:
        leaf = leaf.narrow(dim, stretch.start * each, stretch.number * stretch.size * each)
    return list(torch.split(leaf, stretch.size * each, dim))


def _device(batch: Mapping[str, Any], key_name: str) -> torch.device:
    leaves = tree.leaves_and_spec({name: value for name, value in batch.items() if name != key_name})[0]
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))


def shapes_of(microbatch: Microbatch) -> str:
    """Describe a microbatch's tensors: `batch.input_ids (2, 16), batch.labels (2, 16)`."""
    names, leaves = tree.leaf_names(microbatch, "batch"), tree.leaves_and_spec(microbatch)[0]
    tensors = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)]
    return ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in tensors)


def signature(microbatch: Microbatch) -> Any:
    """Return the cache key of a plan: shapes, dtypes, strides and devices of tensors, and all other values.

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
        (leaf.shape, leaf.dtype, _strides(leaf), leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )


def check_device(microbatch: Microbatch, device: torch.device) -> None:
    """Refuse a batch on another device than the parameters; tensors without dims may be anywhere.

    Raises:
        BatchError: naming the entry.
    """
    for name, value in microbatch.items():
        for leaf in tree.leaves_and_spec(value)[0]:
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.device.type not in (device.type, "meta"):
                raise BatchError(
                    f"batch: {name!r} is on {leaf.device}, but the parameters are on {device}; move it with .to(device)"
                )


def _strides(leaf: Tensor) -> tuple[int, ...] | None:
    return leaf.stride() if leaf.layout is torch.strided else None
