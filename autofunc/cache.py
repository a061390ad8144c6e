"""What all pipelines of a process share: results by what they were made from, in one bounded cache.

Captures, cuts, boundaries and made pieces take seconds, and depend on little: layers, shapes, dtypes, choices. A second
pipeline on the same stages finds them here. Whatever is made here is never changed afterwards, but for what it adds to
itself on demand.
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
    """An object as part of a key, compared by what it is and not by what it holds.

    It does not keep the object alive (but for the few kinds that cannot be referred to weakly), and equals nothing once the
    object is gone: another object at the same address is never taken for it.
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
    """Results by key; beyond `most` the one that was used longest ago is forgotten, and so is what can never be asked for.

    Args:
        most: number of results.
        heaviest: what they may weigh together.
    """

    def __init__(self, most: int, heaviest: float = inf) -> None:
        self._most, self._heaviest = most, heaviest
        self._weights: dict[Hashable, int] = {}
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._watched: dict[Hashable, list[weakref.ref[Any]]] = {}
        self._unreachable: list[Hashable] = []  # keys with an object that is gone; appended to by the garbage collector
        self._lock = threading.RLock()  # what makes a result may ask for others

    def __len__(self) -> int:
        return len(self._results)

    @property
    def weight(self) -> int:
        """What all results weigh."""
        return sum(self._weights.values())

    def get(self, key: Hashable, make: Callable[[], Result], weigh: Callable[[Result], int] = lambda _: 0) -> Result:
        """The result for a key, made if it is not known. An error of `make` passes, and nothing is remembered.

        Args:
            key: a hashable, in which objects without a value to compare by are `Identity`.
            make: makes the result.
            weigh: says what it weighs: of a graph, its nodes.
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
    """Everything that a key refers to weakly."""
    if isinstance(key, Identity):
        value = key.refer()
        if isinstance(key.refer, weakref.ref) and value is not None:
            yield value
    elif isinstance(key, (tuple, frozenset)):
        for part in key:
            yield from _objects(part)


shared = Cache(most=1024, heaviest=200_000)
"""The cache of this process: a model of a hundred different stages fits several times. A node of a graph, with all that
hangs on it, takes some 5 KB, so that captures of many shapes take a GB at most."""
