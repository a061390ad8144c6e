"""Ranks that are threads of one process, and meet where they exchange something."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Meeting:
    """Where as many threads meet as there are ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier, self._places = threading.Barrier(size, timeout=30), [None] * size

    def of_all(self, rank: int, own: Any) -> list[Any]:
        """What each rank brings, by rank, once all have come."""
        self._places[rank] = own
        self._barrier.wait()
        found = list(self._places)
        self._barrier.wait()
        return found

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What the work of each rank gives. Raises what the first that fails does: the others wait for nobody then."""
        made: list[Any] = [None] * self.size
        failed: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                made[rank] = work(rank)
            except BaseException as error:
                failed.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise next((each for each in failed if not isinstance(each, threading.BrokenBarrierError)), failed[0])
        return made
