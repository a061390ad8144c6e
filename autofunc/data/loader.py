"""Batches from a dataset, in parts: a part is the input of one pipeline call.

Every microbatch holds only real rows, or none. A short last batch therefore becomes two parts: its whole microbatches,
then one microbatch of the remaining rows. Each part is padded with microbatches that repeat a row and do not count. So a
loss that averages over a microbatch never includes rows that are not in the dataset.
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
    """A position in a run's data: all a loader needs to resume there, on any number of places."""

    epoch: int = 1
    rows: int = 0  # already read in this epoch

    @property
    def begins_epoch(self) -> bool:
        """True if nothing of the epoch has been read."""
        return self.rows == 0


START = Position()


class Part(NamedTuple):
    """A batch, or one of the two parts of a short one."""

    batch: dict[str, Tensor]  # with the entry COUNTS
    num_rows: int  # real rows in it, over all places
    ends_batch: bool
    after: Position  # once its batch has been consumed


class _Picks(NamedTuple):
    """The rows that one place reads for a part."""

    indices: list[int]
    everywhere: list[int]  # those of all places
    num_real: int  # of its indices; the rest are padding
    microbatch: int  # rows per microbatch
    num_rows: int  # real rows over all places
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
    """Build a loader of `Part`s, in an order that depends on the seed alone.

    Each place reads only its share of every batch: the first place the first rows. What rows draw from random generators
    depends on (seed, epoch, index), so all ranks of a place see the same rows.

    Args:
        dataset: returns a mapping for an index, see `rows.as_row`; all rows have equal shapes.
        rows: rows per batch over all places, a multiple of `places * microbatch`.
        microbatch: rows per microbatch.
        seed: of the order and of the rows' random draws; each epoch has its own order.
        shuffle: False keeps the dataset's order.
        drop_last: drop a short last batch.
        num_workers: loader processes; 0 loads in this one.
        place: index of this place.
        places: number of places that share each batch.
        start: where the first pass over the loader begins; a resumed run passes the last part's `after`.

    Raises:
        DataError: if the dataset has fewer rows than a batch and short batches are dropped; while iterating, for
            items that aren't rows.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if not num_batches(length, rows, drop_last):
        raise DataError(f"the dataset has {length} rows, fewer than one batch of {rows}, and drop_last leaves none")
    sampler: Any = _Sampler(_Order(length, seed if shuffle else None), rows, microbatch, drop_last, place, places, start)
    hand_on: Any = _as_it_is  # the dataset returns whole parts, so there is nothing to collate
    return DataLoader(_Parts(Rows(dataset, seed)), batch_sampler=sampler, collate_fn=hand_on, num_workers=num_workers)


def num_batches(length: int, rows: int, drop_last: bool) -> int:
    """Return the number of batches in an epoch of `length` rows."""
    return length // rows if drop_last else -(-length // rows)


def first_rows(dataset: Dataset[Any], rows: int, start: int = 0, length: int = 0) -> dict[str, Tensor]:
    """Return a batch of `rows` rows from index `start` on, repeating the dataset's last row if needed: a sample batch.

    Args:
        dataset: has rows by index.
        rows: number of rows in the batch.
        start: index of the first row.
        length: least length in tokens, if the dataset pads its rows.

    Raises:
        DataError: for items that aren't rows.
    """
    last = len(dataset) - 1  # type: ignore[arg-type]
    found = Rows(dataset).read([min(index, last) for index in range(start, start + rows)], epoch=1)
    if isinstance(dataset, Padded):
        found = filled_up(found, dataset.padding.fitting(max([length, *map(length_of, found)])))
    return stack(found)


class _Order(NamedTuple):
    """The order in which each epoch reads its rows; independent of earlier epochs."""

    length: int
    seed: int | None  # None keeps the dataset's order

    def of(self, epoch: int) -> Sequence[int]:
        """Return the row indices of an epoch; epochs count from 1."""
        if self.seed is None:
            return range(self.length)
        generator = torch.Generator().manual_seed((self.seed + epoch - 1) % 2**63)
        found: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return found


class _Sampler(Sampler[_Picks]):
    """Yields the picks of one place, part by part."""

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
    """Builds a part from its picks."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getitems__(self, picks: _Picks) -> Part:
        rows = _of_one_length(self._rows, picks)
        batch = stack(rows)
        has_label = labelled(batch)
        counts = has_label.clone()
        counts[picks.num_real :] = False
        # a mean over zero labels is NaN, so microbatches without labels get labelled rows that do not count
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
    """Read rows; if the dataset pads them, pad all places to the same length: the longest that any of them needs."""
    padding = rows.dataset.padding if isinstance(rows.dataset, Padded) else None
    if padding is None:
        return rows.read(picks.indices, picks.epoch)
    found = rows.read([*picks.indices, *picks.everywhere], picks.epoch)
    longest = max(map(length_of, found))
    if not all(labelled(stack([row])).item() for row in found):  # a labelled row may have to stand in
        longest = max(longest, length_of(rows.first_labelled()))
    return filled_up(found[: len(picks.indices)], padding.fitting(longest))


def _as_it_is(part: Part) -> Part:
    return part
