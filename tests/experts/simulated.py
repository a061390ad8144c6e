"""Ranks that share experts, as threads of one process: each runs the same function, and they meet where they exchange."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from autofunc.shard.expert_exchange import register
from autofunc.shard.experts import ExpertRanks
from autofunc.spread import exchanging
from tests.thread_ranks import Meeting

T = TypeVar("T")


class ThreadPeers:
    """See `Peers`; also counts, by rank, what was sent."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.sent_rows: list[int] = []

    def _of_all(self, own: Any) -> list[Any]:
        return self._meeting.of_all(self.rank, own)

    def all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        found = torch.stack(self._of_all(x))
        return lambda: found

    def all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        total = sum(self._of_all(x), torch.zeros_like(x))
        return lambda: total

    def all_to_all(self, x: Tensor, given: list[int] | None, wanted: list[int] | None) -> Callable[[], Tensor]:
        self.sent_rows.append(len(x))
        parts = x.chunk(self.size) if given is None else x.split(given)
        came = [parts[self.rank].clone() for parts in self._of_all(parts)]
        assert wanted is None or wanted == [len(part) for part in came]
        return lambda: torch.cat(came)


def on_ranks(size: int, function: Callable[[int], T]) -> tuple[list[T], list[ThreadPeers]]:
    """What the function gives for each rank, and the ranks."""
    meeting = Meeting(size)
    peers = [ThreadPeers(rank, meeting) for rank in range(size)]

    def run(rank: int) -> T:
        name = f"simulated {id(meeting)} {rank}"
        register(name, peers[rank])
        with exchanging(ExpertRanks(name, rank, size)) if size > 1 else nullcontext():
            return function(rank)

    return meeting.run(run), peers
