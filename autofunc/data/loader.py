"""Batches of equal size from a dataset."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from autofunc.errors import DataError


def make_loader(
    dataset: Dataset[dict[str, Tensor]],
    rows: int,
    *,
    seed: int,
    shuffle: bool,
    drop_last: bool = False,
    num_workers: int = 0,
    place: int = 0,
    places: int = 1,
) -> StatefulDataLoader[Any]:
    """A loader whose every batch has `rows` rows over all places, in an order that depends on the seed alone.

    Each place reads its part of every batch only: the first place the first rows. A last batch that is short is filled with
    rows whose labels are all -100, which weigh nothing, unless `drop_last`.

    Args:
        dataset: gives mappings of tensors of equal shapes.
        rows: rows in a batch of all places; `places` must divide them.
        seed: of the order; each epoch has its own.
        shuffle: False keeps the dataset's order.
        drop_last: leave a short last batch out.
        num_workers: processes that load; 0 loads in this one.
        place: which of the places this is.
        places: how many read parts of each batch.

    Raises:
        DataError: when there is not one whole batch and short ones are dropped.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if drop_last and length < rows:
        raise DataError(f"the dataset has {length} rows, fewer than one batch of {rows}, and drop_last leaves none")
    generator = torch.Generator().manual_seed(seed)
    order: Sampler[int] = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch 2.13 is about to drop; nothing a user could change
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            _WithBlanks(dataset),
            batch_size=rows // places,
            sampler=_Part(order, length, rows, drop_last, place, places),
            collate_fn=_stack,
            num_workers=num_workers,
        )


STACKED = 0
"""The dim of the rows in every batch of these loaders."""


def first_rows(dataset: Dataset[dict[str, Tensor]], rows: int, start: int = 0) -> dict[str, Tensor]:
    """A batch of `rows` rows from the start on, filled with rows that weigh nothing where the dataset ends.

    Raises:
        DataError: see `make_loader`.
    """
    indices = list(range(start, min(start + rows, len(dataset))))  # type: ignore[arg-type]
    return _stack([_WithBlanks(dataset)[index] for index in _filled(indices, rows)])


class _Part(Sampler[int]):
    """The rows of one place, batch by batch."""

    def __init__(self, order: Sampler[int], length: int, rows: int, drop_last: bool, place: int, places: int) -> None:
        self._order, self._rows, self._drop_last = order, rows, drop_last
        self._begin, self._end = place * rows // places, (place + 1) * rows // places
        self._batches = length // rows if drop_last else -(-length // rows)

    def __len__(self) -> int:
        return self._batches * (self._end - self._begin)

    def __iter__(self) -> Iterator[int]:
        indices = iter(self._order)
        for _ in range(self._batches):
            batch = list(itertools.islice(indices, self._rows))
            yield from _filled(batch, self._rows)[self._begin : self._end]


def _filled(indices: list[int], rows: int) -> list[int]:
    """Indices of exactly `rows` rows; `~index` stands for a row like that one which weighs nothing."""
    return indices + [~indices[-1]] * (rows - len(indices))


class _WithBlanks(Dataset[dict[str, Tensor]]):
    """A dataset that also has, at `~index`, a row like the one at `index` with all labels -100."""

    def __init__(self, dataset: Dataset[dict[str, Tensor]]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= 0:
            return self._dataset[index]
        item = self._dataset[~index]
        if "labels" not in item:
            raise DataError(
                "the last batch is short, and without 'labels' it cannot be filled with rows that weigh nothing (it has "
                f"{', '.join(item)}); set dataloader.drop_last: true"
            )
        return {**item, "labels": torch.full_like(item["labels"], -100)}


def _stack(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of these rows.

    Raises:
        DataError: when their shapes differ.
    """
    try:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}
    except (KeyError, RuntimeError) as error:
        raise DataError(f"rows of the dataset do not fit into one batch: {error}") from error
