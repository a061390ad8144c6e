"""Values that functions read besides their arguments, which a capture freezes: compared again at every step, cheaply."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

from autofunc.fingerprint import Fingerprint, Place


class Outside:
    """Numbers, settings and functions that some functions reach through closures, globals and attributes.

    Args:
        roots: gives the functions.
    """

    def __init__(self, roots: Callable[[], Sequence[Any]]) -> None:
        self._roots = roots
        self._places: list[Place] = []
        self._key: Hashable = None
        self._is_known = False
        self.changed: tuple[str, ...] = ()  # names of values that were rebound when the key was last computed

    def key(self) -> Hashable:
        """Return a key that is equal while all values are unchanged. Cheap unless something was assigned."""
        if not (self._is_known and all(place.is_unchanged for place in self._places)):
            self.renew()
        return self._key

    def renew(self) -> None:
        """Collect the values again; needed only if the functions themselves changed."""
        self.changed = tuple(dict.fromkeys(chain.from_iterable(map(_changed, self._places))))
        self._places = []
        keys = Fingerprint(places=self._places)
        self._key, self._is_known = tuple(keys.of(root) for root in self._roots()), True


def _changed(place: Place) -> list[str]:
    """Describe changed members: `coef of loss`."""
    now = tuple(place.members())
    if len(now) != len(place.before) or place.names is None or len(place.names) > len(now):
        return [place.what] if not place.is_unchanged else []
    values = zip(now[-len(place.names) :], place.before[-len(place.names) :], strict=True) if place.names else ()
    return [f"{name!r} of {place.what}" for name, (one, other) in zip(place.names, values, strict=True) if one is not other]
