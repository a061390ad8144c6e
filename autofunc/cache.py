"""A bounded cache that all pipelines of a process share, keyed by the inputs of each result.

Captures, cuts, boundaries and compiled pieces take seconds, and depend on layers, shapes, dtypes and choices only. A second
pipeline on the same stages finds them here. Cached results do not change afterwards, except that some extend themselves on
demand.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from math import inf
from typing import Any, TypeVar

Result = TypeVar("Result")


class Identity:
    """An object as part of a key, compared by identity instead of by value.

    It holds the object weakly (except for the few kinds without weak references), and equals nothing once the object is
    gone: a new object at the same address is never mistaken for it.
    """

    __slots__ = ("_hash", "refer")

    def __init__(self, value: object) -> None:
        self._hash = id(value)
        try:
            self.refer: Callable[[], object] = weakref.ref(value)
        except TypeError:
            self.refer = lambda: value

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        own = self.refer()
        return own is not None and isinstance(other, Identity) and own is other.refer()

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Identity({self.refer()!r})"


class Cache:
    """Results by key. Beyond `most`, the least recently used is dropped; so are results whose key can never occur again.

    Args:
        most: number of results.
        heaviest: limit of their total weight.
    """

    def __init__(self, most: int, heaviest: float = inf) -> None:
        self._most, self._heaviest = most, heaviest
        self._weights: dict[Hashable, int] = {}
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._watched: dict[Hashable, list[weakref.ref[Any]]] = {}
        self._unreachable: list[Hashable] = []  # keys whose object is gone; appended to by the garbage collector
        self._lock = threading.RLock()  # making a result may request others

    def __len__(self) -> int:
        return len(self._results)

    @property
    def weight(self) -> int:
        """Total weight of all results."""
        return sum(self._weights.values())

    def get(self, key: Hashable, make: Callable[[], Result], weigh: Callable[[Result], int] = lambda _: 0) -> Result:
        """Return the result for a key, making it if absent. If `make` raises, nothing is stored.

        Args:
            key: hashable; objects without comparison by value are wrapped in `Identity`.
            make: makes the result.
            weigh: returns a result's weight: for a graph, its number of nodes.
        """
        with self._lock:
            self._forget_unreachable()
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]  # type: ignore[no-any-return]
            result = make()
            self._results[key] = result
            self._watched[key] = [weakref.ref(each, self._gone(key)) for each in _objects(key)]
            self._weights[key] = weigh(result)
            while len(self._results) > self._most or (self.weight > self._heaviest and len(self._results) > 1):
                self._forget(next(iter(self._results)))
            return result

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._results.clear()
            self._weights.clear()
            self._watched.clear()
            self._unreachable.clear()

    def _gone(self, key: Hashable) -> Callable[[object], None]:
        return lambda _: self._unreachable.append(key)

    def _forget_unreachable(self) -> None:
        while self._unreachable:
            self._forget(self._unreachable.pop())

    def _forget(self, key: Hashable) -> None:
        self._results.pop(key, None)
        self._weights.pop(key, None)
        self._watched.pop(key, None)


def _objects(key: Hashable) -> Iterator[object]:
    """Yield every object that a key refers to weakly."""
    if isinstance(key, Identity):
        value = key.refer()
        if isinstance(key.refer, weakref.ref) and value is not None:
            yield value
    elif isinstance(key, (tuple, frozenset)):
        for part in key:
            yield from _objects(part)


shared = Cache(most=1024, heaviest=200_000)
"""The cache of this process. A model of a hundred different stages fits several times. A node of a graph takes some 5 KB,
everything attached included, so captures of many shapes take a GB at most."""
