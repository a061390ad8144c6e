"""Ranks that share experts, as threads of one process: each runs the same function, and they meet where they exchange."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from autofunc.shard.expert_exchange import register
from autofunc.shard.experts import ExpertRanks
from autofunc.spread import exchanging

T = TypeVar("T")


class ThreadPeers:
    """See `Peers`; also counts, by rank, what was sent."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._table, self._barrier = rank, size, table, barrier
        self.sent_rows: list[int] = []

    def _of_all(self, own: Any) -> list[Any]:
        self._table[self.rank] = own
        self._barrier.wait()
        found = list(self._table)
        self._barrier.wait()
        return found

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._of_all(x))

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum(self._of_all(x), torch.zeros_like(x))

    def all_to_all(self, x: Tensor, given: list[int] | None, wanted: list[int] | None) -> Tensor:
        self.sent_rows.append(len(x))
        parts = x.chunk(self.size) if given is None else x.split(given)
        came = [parts[self.rank].clone() for parts in self._of_all(parts)]
        assert wanted is None or wanted == [len(part) for part in came]
        return torch.cat(came)


def on_ranks(size: int, function: Callable[[int], T]) -> tuple[list[T], list[ThreadPeers]]:
    """What the function gives for each rank, and the ranks."""
    barrier = threading.Barrier(size, timeout=20)
    table: list[Any] = [None] * size
    peers = [ThreadPeers(rank, size, table, barrier) for rank in range(size)]

    def run(rank: int) -> T:
        name = f"simulated {id(table)} {rank}"
        register(name, peers[rank])
        with exchanging(ExpertRanks(name, rank, size)) if size > 1 else nullcontext():
            try:
                return function(rank)
            except BaseException:
                barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size))), peers
