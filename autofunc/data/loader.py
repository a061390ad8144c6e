"""Batches from a dataset, as parts: what one call of a pipeline takes.

Every microbatch has real rows only, or none. A short last batch is therefore two parts: its whole microbatches, and then
one microbatch of the rows that are left. Each part is filled up with microbatches that repeat a row and do not count. So a
loss that is a mean over a microbatch is never one over rows that are not in the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from autofunc.batch import COUNTS
from autofunc.data.padding import Padded, filled_up, length_of
from autofunc.data.rows import Rows, labelled, stack
from autofunc.errors import DataError

STACKED = 0
"""The dim of the rows in every batch of these loaders."""


class Position(NamedTuple):
    """A place in the data of a run: all that a loader needs to go on from it, on any number of places."""

    epoch: int = 1
    rows: int = 0  # that have been read in it

    @property
    def begins_epoch(self) -> bool:
        """Whether nothing of the epoch has been read."""
        return self.rows == 0


START = Position()


class Part(NamedTuple):
    """A batch, or one of the two parts of a short one."""

    batch: dict[str, Tensor]  # with the entry COUNTS
    num_rows: int  # of the dataset in it, over all places
    ends_batch: bool
    after: Position  # when its batch has been used


class _Picks(NamedTuple):
    """The rows of one place in a part."""

    indices: list[int]
    everywhere: list[int]  # those of all places
    num_real: int  # of its indices; the others fill up
    microbatch: int  # rows of each microbatch
    num_rows: int  # real ones over all places
    ends_batch: bool
    epoch: int
    after: Position


def make_loader(
    dataset: Dataset[Any],
    rows: int,
    *,
    microbatch: int,
    seed: int,
    shuffle: bool,
    drop_last: bool = False,
    num_workers: int = 0,
    place: int = 0,
    places: int = 1,
    start: Position = START,
) -> DataLoader[Any]:
    """A loader of `Part`s, in an order that depends on the seed alone.

    Each place reads its part of every batch only: the first place the first rows. What rows draw from random generators
    depends on (seed, epoch, index), so that all ranks of a place have the same rows.

    Args:
        dataset: gives a mapping for an index, see `rows.as_row`; all of equal shapes.
        rows: rows in a batch of all places; `places * microbatch` must divide them.
        microbatch: rows in a microbatch.
        seed: of the order, and of what rows draw; each epoch has its own.
        shuffle: False keeps the dataset's order.
        drop_last: leave a short last batch out.
        num_workers: processes that load; 0 loads in this one.
        place: which of the places this is.
        places: how many read parts of each batch.
        start: where the first pass over the loader begins; a run that goes on gives the last part's `after`.

    Raises:
        DataError: when there is not one whole batch and short ones are dropped; from the loader, for rows that are none.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if not num_batches(length, rows, drop_last):
        raise DataError(f"the dataset has {length} rows, fewer than one batch of {rows}, and drop_last leaves none")
    sampler: Any = _Sampler(_Order(length, seed if shuffle else None), rows, microbatch, drop_last, place, places, start)
    hand_on: Any = _as_it_is  # a part is whole already, where a loader expects rows
    return DataLoader(_Parts(Rows(dataset, seed)), batch_sampler=sampler, collate_fn=hand_on, num_workers=num_workers)


def num_batches(length: int, rows: int, drop_last: bool) -> int:
    """Batches in an epoch of `length` rows."""
    return length // rows if drop_last else -(-length // rows)


def first_rows(dataset: Dataset[Any], rows: int, start: int = 0, length: int = 0) -> dict[str, Tensor]:
    """A batch of `rows` rows from the start on, the last one repeated where the dataset ends: to look at and to try.

    Args:
        dataset: has rows by index.
        rows: of the batch.
        start: index of the first one.
        length: that they are filled up to at least, where the dataset's rows are filled up.

    Raises:
        DataError: for rows that are none.
    """
    last = len(dataset) - 1  # type: ignore[arg-type]
    found = Rows(dataset).read([min(index, last) for index in range(start, start + rows)], epoch=1)
    if isinstance(dataset, Padded):
        found = filled_up(found, dataset.padding.fitting(max([length, *map(length_of, found)])))
    return stack(found)


class _Order(NamedTuple):
    """In what order the rows of each epoch are read; known without the epochs before it."""

    length: int
    seed: int | None  # None keeps the dataset's

    def of(self, epoch: int) -> Sequence[int]:
        """The indices of an epoch, from 1 on."""
        if self.seed is None:
            return range(self.length)
        generator = torch.Generator().manual_seed((self.seed + epoch - 1) % 2**63)
        found: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return found


class _Sampler(Sampler[_Picks]):
    """The picks of one place, part by part."""

    def __init__(
        self, order: _Order, rows: int, microbatch: int, drop_last: bool, place: int, places: int, start: Position
    ) -> None:  # fmt: skip
        self._order, self._rows, self._microbatch, self._drop_last = order, rows, microbatch, drop_last
        self._place, self._count = place, rows // places // microbatch
        self._microbatches = rows // microbatch
        self._next = start
        whole, short = divmod(order.length, rows)
        self._length = whole + (0 if drop_last else sum(map(bool, divmod(short, microbatch))))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Picks]:
        (epoch, begin), self._next = self._next, Position(self._next.epoch + 1)
        order = self._order.of(epoch)
        last = len(order) - (len(order) - begin) % self._rows if self._drop_last else len(order)
        for at in range(begin, last, self._rows):
            batch = list(order[at : min(at + self._rows, last)])
            read = at + len(batch)
            after = Position(epoch, read) if read < last else Position(epoch + 1)
            whole = len(batch) // self._microbatch * self._microbatch
            cut = ((batch[:whole], self._microbatch), (batch[whole:], len(batch) - whole))
            parts = [(part, size) for part, size in cut if part]
            for number, (part, size) in enumerate(parts, start=1):
                yield self._picks(part, size, number == len(parts), epoch, after)

    def _picks(self, part: list[int], size: int, ends_batch: bool, epoch: int, after: Position) -> _Picks:
        begin, end = self._place * self._count * size, (self._place + 1) * self._count * size
        filled = part + part[-1:] * (self._microbatches * size - len(part))
        real = min(max(len(part) - begin, 0), end - begin)
        return _Picks(filled[begin:end], part, real, size, len(part), ends_batch, epoch, after)


class _Parts(Dataset[Any]):
    """Parts by their picks."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getitems__(self, picks: _Picks) -> Part:
        rows = _of_one_length(self._rows, picks)
        batch = stack(rows)
        has_label = labelled(batch)
        counts = has_label.clone()
        counts[picks.num_real :] = False
        # a mean over no label is no number, so microbatches without any get rows that have some, and do not count
        bare = [at for at in range(0, len(rows), picks.microbatch) if not has_label[at : at + picks.microbatch].any()]
        stand_in = self._rows.first_labelled() if bare else {}
        if bare and isinstance(self._rows.dataset, Padded):
            (stand_in,) = filled_up([stand_in], length_of(rows[0]))
        for at in bare:
            rows[at : at + picks.microbatch] = [stand_in] * picks.microbatch
        return Part(
            {**(stack(rows) if bare else batch), COUNTS: counts.float()}, picks.num_rows, picks.ends_batch, picks.after
        )


def _of_one_length(rows: Rows, picks: _Picks) -> list[dict[str, Tensor]]:
    """Rows, filled up where the dataset says so: on all places to the same length, which their rows together need."""
    padding = rows.dataset.padding if isinstance(rows.dataset, Padded) else None
    if padding is None:
        return rows.read(picks.indices, picks.epoch)
    found = rows.read([*picks.indices, *picks.everywhere], picks.epoch)
    longest = max(map(length_of, found))
    if not all(labelled(stack([row])).item() for row in found):  # one that has labels may have to stand in
        longest = max(longest, length_of(rows.first_labelled()))
    return filled_up(found[: len(picks.indices)], padding.fitting(longest))


def _as_it_is(part: Part) -> Part:
    return part
