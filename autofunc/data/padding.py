"""Padding of rows of different lengths to one of a few lengths, so that batches have few shapes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.errors import DataError
from autofunc.losses import IGNORED

IDS = "input_ids"
"""The entry that defines a row's length."""


class Padding(NamedTuple):
    """The lengths, in tokens, that rows are padded to."""

    multiple_of: int | None = None
    lengths: tuple[int, ...] = ()  # ascending; used if multiple_of is None

    def fitting(self, length: int) -> int:
        """Return the shortest of them that fits a row of `length` tokens.

        Raises:
            DataError: if the row is longer than all of them.
        """
        if self.multiple_of is not None:
            return max(-(-length // self.multiple_of), 1) * self.multiple_of
        at = bisect_left(self.lengths, length)
        if at == len(self.lengths):
            raise DataError(
                f"a row has {length:,} tokens, and dataloader.pad_seq_len_to has at most {self.lengths[-1]:,}; add a "
                "longer length, or give the dataset a shorter seq_length"
            )
        return self.lengths[at]


class Padded(Dataset[Any]):
    """A dataset whose rows are padded when they become a batch.

    Args:
        dataset: its rows have `input_ids` of any length; entries of the same length are padded too.
        padding: the allowed lengths.
    """

    def __init__(self, dataset: Any, padding: Padding) -> None:
        self.dataset, self.padding = dataset, padding

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def length_of(row: Mapping[str, Tensor]) -> int:
    """Return the number of tokens in a row.

    Raises:
        DataError: if it has no `input_ids` of shape (tokens,).
    """
    ids = row.get(IDS)
    if ids is None or ids.dim() != 1:
        found = f"{tuple(ids.shape)}" if ids is not None else f"none, but {', '.join(row)}"
        raise DataError(f"rows are padded to the length of {IDS}, which must have shape (tokens,); got {found}")
    return len(ids)


def filled_up(rows: Sequence[Mapping[str, Tensor]], length: int) -> list[dict[str, Tensor]]:
    """Pad all per-token entries of the rows to one length: labels and targets with -100, others with zeros.

    A model that looks ahead needs an `attention_mask` in its rows; its padding is zero.
    """
    return [{name: _filled_up(name, leaf, length_of(row), length) for name, leaf in row.items()} for row in rows]


def _filled_up(name: str, leaf: Tensor, own: int, length: int) -> Tensor:
    if not leaf.dim() or len(leaf) != own or own == length:
        return leaf
    if leaf.dim() == 2 and leaf.shape[1] == own:  # an entry per pair of tokens
        return torch.nn.functional.pad(leaf, (0, length - own, 0, length - own))
    learnt = "label" in name.lower() or "target" in name.lower()
    rest = leaf.new_full((length - own, *leaf.shape[1:]), IGNORED if learnt else 0)
    return torch.cat([leaf, rest])
