"""Batches of equal size from a dataset."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
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
) -> StatefulDataLoader[Any]:
    """A loader whose every batch has `rows` rows, in an order that depends on the seed alone.

    A last batch that is short is filled with rows whose labels are all -100, which weigh nothing, unless `drop_last`.

    Args:
        dataset: gives mappings of tensors of equal shapes.
        rows: rows in a batch.
        seed: of the order; each epoch has its own.
        shuffle: False keeps the dataset's order.
        drop_last: leave a short last batch out.
        num_workers: processes that load; 0 loads in this one.

    Raises:
        DataError: when there is not one whole batch and short ones are dropped.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if drop_last and length < rows:
        raise DataError(f"the dataset has {length} rows, fewer than one batch of {rows}, and drop_last leaves none")
    sampler: Sampler[int]
    if shuffle:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    else:
        sampler = SequentialSampler(dataset)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch 2.13 is about to drop; nothing a user could change
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            dataset,
            batch_size=rows,
            sampler=sampler,
            collate_fn=partial(collate, rows=rows),
            drop_last=drop_last,
            num_workers=num_workers,
        )


def collate(items: Sequence[dict[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """Stack items into a batch of exactly `rows` rows; missing rows repeat the last one with all labels -100.

    Raises:
        DataError: when rows are missing and the items have no labels, or shapes differ.
    """
    try:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    except (KeyError, RuntimeError) as error:
        raise DataError(f"rows of the dataset do not fit into one batch: {error}") from error
    missing = rows - len(items)
    if not missing:
        return batch
    if "labels" not in batch:
        raise DataError(
            f"the last batch has {len(items)} of {rows} rows, and without 'labels' it cannot be filled with rows that "
            f"weigh nothing (it has {', '.join(batch)}); set dataloader.drop_last: true"
        )
    filled = {name: torch.cat((leaf, leaf[-1:].expand(missing, *leaf.shape[1:]))) for name, leaf in batch.items()}
    filled["labels"][len(items) :] = -100
    return filled
