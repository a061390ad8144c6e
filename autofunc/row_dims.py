"""The number of rows in a batch, and the dim of each tensor that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autofunc import tree
from autofunc.errors import BatchError
from autofunc.random import KEY

BatchDims = Mapping[str, int | None] | int | None
"""Dims of the rows: see `row_dims`."""


def row_dims(
    batch: Mapping[str, Any], batch_dims: BatchDims = None, *, cuts: bool = True, key_name: str = KEY
) -> tuple[int, dict[str, list[int | None]]]:
    """Return the number of rows in a batch, and the dim of each leaf that holds them.

    The batch size is the size of dim 0 that most tensors share. Tensors with that size in dim 0 are cut along it; every
    microbatch gets all other leaves whole. `batch_dims` overrides this per entry: a dim to cut along, or None for whole.
    Ambiguous entries are refused: a dim 0 of several times as many rows (two pictures per row?), and, unless `batch_dims`
    names any entry, a tensor with that size in a second dim, if an entry of different shape or dtype has it there as well
    (a mask of tokens x tokens, positions of axes x rows x tokens).

    Args:
        batch: mapping of pytrees of tensors.
        batch_dims: entry -> dim or None; a single number applies to all entries. Named entries may have several times as
            many rows as the batch.
        cuts: False for a batch that will not be cut, which is never ambiguous.
        key_name: entry of the key, which has no rows.

    Returns:
        The number of rows, and for each leaf of an entry the dim to cut; None: every microbatch gets it whole.

    Raises:
        BatchError: if nothing has rows, or an entry is ambiguous.
    """
    given = dict.fromkeys(batch, batch_dims) if isinstance(batch_dims, int) else dict(batch_dims or {})
    unknown = sorted(set(given) - set(batch))
    if unknown:
        raise BatchError(f"batch_dims names {unknown[0]!r}, which is not in the batch: {', '.join(map(str, batch))}")
    leaves = _leaves(batch, key_name)
    rows = _batch_size(leaves, given)
    dims: dict[str, list[int | None]] = {
        name: [_dim(leaf, name, rows, given) for leaf in each] for name, each in leaves.items()
    }
    if cuts:
        _refuse_ambiguous(leaves, rows, given)
    return rows, dims


def rows_in_words(batch: Mapping[str, Any], batch_dims: BatchDims = None, *, key_name: str = KEY) -> str:
    """Describe how a batch is cut: `8 rows, in dim 0 of ids, labels, in dim 1 of positions; whole: mask`.

    Args:
        batch: mapping of pytrees of tensors.
        batch_dims: see `row_dims`.
        key_name: see `row_dims`.
    """
    rows, dims = row_dims(batch, batch_dims, cuts=False, key_name=key_name)
    places: dict[int | None, list[str]] = {}
    for name, each in dims.items():
        tensors = [leaf for leaf in tree.leaves_and_spec(batch[name])[0] if isinstance(leaf, Tensor)]
        for dim in dict.fromkeys(each) if tensors else ():
            places.setdefault(dim, []).append(str(name))
    cut = "".join(f", in dim {dim} of {', '.join(names)}" for dim, names in places.items() if dim is not None)
    whole = f"; whole: {', '.join(places[None])}" if None in places else ""
    return f"{rows} rows{cut}{whole}"


def refuse_ambiguous(
    batch: Mapping[str, Any], rows: int, batch_dims: BatchDims = None, *, key_name: str = KEY
) -> None:  # fmt: skip
    """Refuse entries that are ambiguous, see `row_dims`.

    Args:
        batch: mapping of pytrees of tensors.
        rows: in the batch.
        batch_dims: see `row_dims`.
        key_name: see `row_dims`.

    Raises:
        BatchError: naming the entry and the remedy.
    """
    leaves = _leaves(batch, key_name)
    _refuse_ambiguous(leaves, rows, leaves if isinstance(batch_dims, int) else batch_dims or {})


def _leaves(batch: Mapping[str, Any], key_name: str) -> dict[str, list[Any]]:
    return {name: tree.leaves_and_spec(value)[0] for name, value in batch.items() if name != key_name}


def _refuse_ambiguous(leaves: Mapping[str, list[Any]], rows: int, given: Mapping[str, Any]) -> None:
    for name, each in leaves.items():
        for leaf in each if name not in given else ():
            _refuse_several_a_row(leaf, name, rows)
            if not given:
                _refuse_square(leaf, name, rows, [other for key in leaves if key != name for other in leaves[key]])


def _batch_size(leaves: Mapping[str, list[Any]], batch_dims: Mapping[str, int | None]) -> int:
    """Return the batch-dim size that most tensors share; on a tie, the size of entries without `batch_dims`."""
    names: dict[int, list[str]] = {}
    for name, each in leaves.items():
        dim = batch_dims.get(name, 0)
        if dim is None:
            continue
        for leaf in each:
            if isinstance(leaf, Tensor) and leaf.dim() > dim:
                names.setdefault(leaf.shape[dim], []).append(str(name))
    if not names:
        raise BatchError(f"nothing in the batch has rows to cut: {', '.join(map(str, leaves)) or 'it is empty'}")
    (rows, sharing), *others = sorted(
        names.items(), key=lambda item: (-len(item[1]), all(n in batch_dims for n in item[1]))
    )
    if others and len(others[0][1]) == len(sharing) and not all(name in batch_dims for name in others[0][1]):
        raise BatchError(
            f"cannot tell the batch size: {sharing[0]!r} has {rows} rows and {others[0][1][0]!r} has {others[0][0]}; "
            f"set batch_dims={{{others[0][1][0]!r}: None}} for entries that every microbatch gets whole"
        )
    if rows == 0:
        raise BatchError(f"the batch has no rows: {sharing[0]!r} is empty")
    return rows


def _dim(leaf: Any, name: str, rows: int, given: Mapping[str, int | None]) -> int | None:
    dim = given.get(name, 0)
    if dim is None or not isinstance(leaf, Tensor) or leaf.dim() <= dim:
        return None
    if name not in given:
        return dim if leaf.shape[dim] == rows else None
    if leaf.shape[dim] % rows:
        raise BatchError(f"batch[{name!r}] has {leaf.shape[dim]} rows in dim {dim}, but the batch has {rows}")
    return dim


def _refuse_several_a_row(leaf: Any, name: str, rows: int) -> None:
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] > rows > 1 and leaf.shape[0] % rows == 0:
        raise BatchError(
            f"batch[{name!r}] has {leaf.shape[0]} in dim 0, {leaf.shape[0] // rows} for each of {rows} rows or for all of "
            f"them: set batch_dims={{{name!r}: 0}} to cut it with the rows, or {{{name!r}: None}} to pass it whole"
        )


def _refuse_square(leaf: Any, name: str, rows: int, others: list[Any]) -> None:
    if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.shape[0] != rows or rows == 1:
        return
    dims = [dim for dim in range(1, leaf.dim()) if leaf.shape[dim] == rows]
    unlike = (
        other for other in others if isinstance(other, Tensor) and (other.shape, other.dtype) != (leaf.shape, leaf.dtype)
    )
    elsewhere = any(rows in other.shape[1:] or (other.dim() > 1 and other.shape[:2] == leaf.shape[1:3]) for other in unlike)
    if dims and elsewhere:
        listed = ", ".join(map(str, [0, *dims]))
        raise BatchError(
            f"batch[{name!r}] of shape {tuple(leaf.shape)} may have the {rows} rows in dim {listed} or nowhere: set "
            f"batch_dims={{{name!r}: 0}}, another dim, or None to pass it whole to every microbatch"
        )
