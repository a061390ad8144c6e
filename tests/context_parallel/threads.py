"""cp ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc.context_parallel.ranks import known_as


class Threads:
    """Ranks that are threads of one process: what each gives lies in one list."""

    def __init__(self, rank: int, places: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._places, self._barrier = rank, len(places), places, barrier
        self.count: Counter[str] = Counter()

    def _exchange(self, given: Any) -> list[Any]:
        self._places[self.rank] = given
        self._barrier.wait()
        found = list(self._places)
        self._barrier.wait()
        return found

    def gather(self, x: Tensor) -> list[Tensor]:
        self.count["gather"] += 1
        return [each.clone() for each in self._exchange(x)]

    def reduce_scatter(self, given: Sequence[Tensor]) -> Tensor:
        self.count["reduce_scatter"] += 1
        return torch.stack([each[self.rank] for each in self._exchange(given)]).sum(0)

    def rotate(self, x: Tensor) -> Callable[[], Tensor]:
        self.count["rotate"] += 1
        arriving = self._exchange(x)[self.rank - 1].clone()
        return lambda: arriving


def on_ranks(size: int, function: Callable[[Threads, str], Any]) -> tuple[list[Any], list[Counter[str]]]:
    """What a function gives on each rank, and what each exchanged."""
    places, barrier = [None] * size, threading.Barrier(size, timeout=30)
    ranks = [Threads(rank, places, barrier) for rank in range(size)]
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            known_as(f"threads {rank}", ranks[rank])
            found[rank] = function(ranks[rank], f"threads {rank}")
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found, [rank.count for rank in ranks]
