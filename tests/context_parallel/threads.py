"""cp ranks as threads of one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc.context_parallel.ranks import known_as
from tests.thread_ranks import Meeting


class Threads:
    """`ContextRanks` as one thread sees them; threads exchange values at a meeting."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.count: Counter[str] = Counter()

    def _exchange(self, given: Any) -> list[Any]:
        return self._meeting.of_all(self.rank, given)

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
    """Run a function on every rank; return the results, and counts of each rank's exchanges."""
    meeting = Meeting(size)
    ranks = [Threads(rank, meeting) for rank in range(size)]

    def run(rank: int) -> Any:
        known_as(f"threads {rank}", ranks[rank])
        return function(ranks[rank], f"threads {rank}")

    return meeting.run(run), [rank.count for rank in ranks]
