"""Rows of a dataset, as tensors by name."""

from __future__ import annotations

import hashlib
import numbers
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autofunc.errors import FAILURES, DataError, in_brief
from autofunc.losses import IGNORED

_EXPECTED = (
    "expected a mapping of names to tensors, arrays, lists of numbers or numbers, such as {'input_ids': ..., 'labels': ...}"
)


class Rows:
    """A dataset's rows: within an epoch each is the same no matter how often, where and in what order it is read.

    Whatever a row draws from the generators of Python, numpy and torch depends on (seed, epoch, index); the generators are
    restored afterwards. Text columns are dropped.

    Args:
        dataset: has rows by index.
        seed: of the rows' random draws.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset, self._seed = dataset, seed
        self._labelled: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int], epoch: int) -> list[dict[str, Tensor]]:
        """Read the rows of `indices`, in that order.

        Raises:
            DataError: naming a row that cannot be read, or isn't a mapping of tensors.
        """
        known: dict[int, dict[str, Tensor]] = {}
        with _generators_kept():
            for index in indices:
                if index not in known:
                    _seed_generators(self._seed, epoch, index)
                    known[index] = as_row(self._item(index), index)
        return [known[index] for index in indices]

    def first_labelled(self) -> dict[str, Tensor]:
        """Return the first row that has a label.

        Raises:
            DataError: if none has.
        """
        if self._labelled is None:
            every = (self.read([index], 0)[0] for index in range(len(self)))
            self._labelled = next((row for row in every if labelled(stack([row])).item()), None)
            if self._labelled is None:
                raise DataError(f"no row of the dataset has a label: all of them are {IGNORED}")
        return self._labelled

    def _item(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except FAILURES as error:  # the user's dataset may raise anything
            raise DataError(f"row {index} of the dataset: {in_brief(error)}") from error


def as_row(item: Any, index: int) -> dict[str, Tensor]:
    """Return a dataset's item as tensors by name, without text columns.

    Raises:
        DataError: naming the row, what it is and what was expected.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"row {index} of the dataset is {_kind(item)}; {_EXPECTED}")
    row = {str(name): _as_tensor(value, str(name), index) for name, value in item.items() if not _is_text(value)}
    if not row:
        raise DataError(f"row {index} of the dataset has only text ({', '.join(map(str, item)) or 'nothing'}); {_EXPECTED}")
    return row


def text_columns(dataset: Any) -> list[str]:
    """Return the names of the first row's text entries, which are dropped."""
    with _generators_kept():
        _seed_generators(0, 0, 0)
        item = Rows(dataset)._item(0)
    return [str(name) for name, value in item.items() if _is_text(value)] if isinstance(item, Mapping) else []


def labelled(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which rows of a batch have labels, bool of shape (rows,).

    A row has none if one of its integer entries is -100 throughout, unless another label or target entry is not.
    """
    rows = len(next(iter(batch.values())))
    ignored, other = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    for name, leaf in batch.items():
        if leaf.numel() and not leaf.is_floating_point():
            without = (leaf == IGNORED).reshape(rows, -1).all(1)
            ignored |= without
            if "label" in name.lower() or "target" in name.lower():
                other |= ~without
    return ~ignored | other


def stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows into a batch, along a new first dim.

    Raises:
        DataError: if their names or shapes differ.
    """
    batch = {}
    for name in rows[0]:
        try:
            batch[name] = torch.stack([row[name] for row in rows])
        except (KeyError, RuntimeError) as error:
            shapes = {str(tuple(row[name].shape)) if name in row else "nothing" for row in rows}
            raise DataError(
                f"rows of the dataset do not fit into one batch: {name!r} is {' and '.join(sorted(shapes))}; pad them to "
                "one length"
            ) from error
    return batch


def _as_tensor(value: Any, name: str, index: int) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, (np.ndarray, np.generic, numbers.Number, list, tuple)):
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Tensor, np.ndarray)):
                return torch.stack([torch.as_tensor(each) for each in value])
            return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"row {index} of the dataset: {name!r} cannot be a tensor: {error}") from error
    raise DataError(f"row {index} of the dataset: {name!r} is {_kind(value)}; {_EXPECTED}")


def _is_text(value: Any) -> bool:
    """Return whether a value is text, or a list of texts."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "US" or (value.dtype == object and bool(value.size) and _is_text(value.flat[0]))
    return isinstance(value, (str, bytes)) or (isinstance(value, (list, tuple)) and bool(value) and _is_text(value[0]))


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _seed_generators(seed: int, epoch: int, index: int) -> None:
    drawn = int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=7).digest())
    random.seed(drawn)
    np.random.seed(drawn & 0xFFFFFFFF)
    torch.default_generator.manual_seed(drawn)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the generators of Python, numpy and torch (CPU) on exit."""
    ours, numpys, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)
        torch.set_rng_state(torchs)
