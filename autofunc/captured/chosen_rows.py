"""What a forward may ask of the rows its masks choose, while it is exported with all places of those masks.

All places are more than the rows that count, and a row's position among them differs. So a length may only be a size in a
view; a plain `for` loop goes through all places, and inside of it an element is a plain number.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autofunc.captured.all_places import all_places, body, end_body
from autofunc.captured.loop_effects import is_left_out

Refuse = Callable[[str], Exception]
"""From what a forward does with rows ("reads their number") to the error that refuses it."""


class Length(int):
    """The number of rows: usable as a size in a view, but not as a number."""

    refuse: Refuse

    def _read(self, *_: Any) -> Any:
        raise self.refuse("reads their number; a check for zero rows is not needed, since then nothing is written back")


_OF_OBJECTS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__str__", "__format__"}
for _name in set(dir(int)) - set(dir(object)) | _OF_OBJECTS:
    setattr(Length, _name, Length._read)


@dataclass(eq=False)
class _Body:
    """One run of a loop over places."""

    is_running: bool = True


class ChosenRows:
    """The rows chosen by masks in one forward.

    Args:
        refuse: see `Refuse`.
        shortened: loops skip their first and last runs.
    """

    def __init__(self, refuse: Refuse, *, shortened: bool = False) -> None:
        self._refuse, self._shortened = refuse, shortened
        self._length = type("Length", (Length,), {"refuse": staticmethod(refuse)})
        self._of: dict[int, tuple[Tensor, frozenset[int]]] = {}  # by id: a value made from rows, and their numbers
        self._fresh: list[Tensor] = []  # places that the running function asked for
        self._values: dict[int, tuple[Tensor, np.ndarray[Any, Any], _Body | None]] = {}  # by id: places with known values

    def places(self, mask: Tensor, line: str) -> list[Tensor]:
        """All places of a mask; see `all_places`."""
        found = all_places(mask, line)
        for column, values in zip(found, np.indices(mask.shape), strict=True):
            self._note(column, frozenset([mask.numel()]))
            self._values[id(column)] = (column, values.reshape(-1), None)
        self._fresh = found
        return found

    def value(self, found: Tensor) -> Any:
        """Return the number that an element of places is, inside the loop over them; None for anything else.

        Raises:
            ModelError: outside the loop.
        """
        known = self._values.get(id(found))
        if known is None or known[1].size != 1:
            return None
        if known[2] is None or not known[2].is_running:
            raise self._refuse("reads a place outside a loop over them")
        return known[1].item()

    def called(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Run a function of torch, or answer for it.

        Args:
            func: the function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            run: calls it.
        """
        if func is torch.Tensor.__format__ and (known := self.value(args[0])) is not None:
            return format(known, *args[1:])
        self._fresh = []
        given = [*_flat(args), *_flat(kwargs.values())]
        counts = frozenset[int]().union(*(self._of[id(each)][1] for each in given if id(each) in self._of))
        first = args[0] if args else None
        own = self._of.get(id(first), (None, frozenset[int]()))[1]
        if func in _SIZES and own:
            return self._sizes(func, run(), own)
        if any(isinstance(each, Length) for each in given) and not (own and func in _VIEWING):
            raise self._refuse("reads their number")
        if func is torch.Tensor.unbind and id(first) in self._values and (frame := _looping()) is not None:
            return self._loop(first, frame)  # type: ignore[arg-type]
        result = run()
        if self._fresh:
            counts |= self._of[id(self._fresh[0])][1]
            if func in _NONZERO and isinstance(result, Tensor):
                columns = [self._values[id(column)][1] for column in self._fresh]
                self._values[id(result)] = (result, np.stack(columns, 1), None)
        if counts and not (func in _BACK and not own):
            for made in _flat([first if result is None else result]):
                if isinstance(made, Tensor):
                    self._note(made, counts)
        if id(first) in self._values and isinstance(result, Tensor):
            self._follow(func, args, result)
        return result

    def _note(self, made: Tensor, counts: frozenset[int]) -> None:
        self._of[id(made)] = (made, counts | self._of.get(id(made), (made, frozenset()))[1])

    def _sizes(self, func: Any, found: Any, counts: frozenset[int]) -> Any:
        """Return sizes, with those of rows as `Length`."""
        if func is torch.Tensor.__len__:
            if found in counts:
                raise self._refuse("reads their number")
            return found
        if isinstance(found, int):
            return self._length(found) if found in counts or func in _ALL else found
        return torch.Size([self._length(size) if size in counts else size for size in found])

    def _follow(self, func: Any, args: Sequence[Any], result: Tensor) -> None:
        """Track the values of a mere view of places."""
        _, values, running = self._values[id(args[0])]
        if func is torch.Tensor.__getitem__ and all(
            part in (None, ...) or type(part) in (int, slice) for part in _flat([args[1]])
        ):
            made = values[args[1]]
        elif func in _RESHAPING:
            made = values.reshape(tuple(result.shape))
        else:
            return
        self._values[id(result)] = (result, np.asarray(made), running)

    def _loop(self, places: Tensor, frame: FrameType) -> Iterator[Tensor]:
        """Go through all places; what runs for each is enclosed by marks in the graph."""
        _, values, _ = self._values[id(places)]
        before = _numbers(frame)
        finished = False
        try:
            for index in range(len(values)):
                if self._shortened and is_left_out(index, len(values)):
                    continue
                number = int(values[index].item()) if values[index].size == 1 else None
                element, running = body(places, index, number), _Body()
                self._values[id(element)] = (element, np.asarray(values[index]), running)
                yield element
                running.is_running = False
                now = _numbers(frame)
                changed = next((name for name, value in before.items() if name in now and now[name] != value), None)
                if changed is not None:
                    raise self._refuse(f"counts them in {changed!r}, in a loop over them")
                end_body(element)
            finished = True
        finally:
            if not finished:
                self._refuse("leaves a loop over them early")


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _numbers(frame: FrameType) -> dict[str, Any]:
    """Return the plain values among a function's local variables."""
    return {name: value for name, value in frame.f_locals.items() if isinstance(value, (int, float, str, bool, type(None)))}


def _looping() -> FrameType | None:
    """Return the frame whose plain `for` statement iterates over a tensor, if there is one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not torch.Tensor.__iter__.__code__:
        if not str(frame.f_globals.get("__name__")).startswith(__name__.partition(".")[0]):
            return None
        frame = frame.f_back
    user = None if frame is None else frame.f_back
    if user is None:
        return None
    steps = (step.opname for step in dis.get_instructions(user.f_code) if step.offset >= user.f_lasti)
    first, *_ = named = [name for name in islice(steps, 3) if name != "EXTENDED_ARG"]
    return user if first == "GET_ITER" and "FOR_ITER" in named[1:2] else None


_SHAPE: Any = torch.Tensor.shape
_ALL = {torch.Tensor.numel, torch.Tensor.nelement}
_SIZES = {_SHAPE.__get__, torch.Tensor.size, torch.Tensor.__len__, *_ALL}
_NONZERO = {torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere}
_RESHAPING = {
    torch.Tensor.squeeze, torch.squeeze, torch.Tensor.flatten, torch.flatten, torch.Tensor.view, torch.Tensor.reshape,
    torch.reshape, torch.Tensor.unsqueeze, torch.unsqueeze, torch.Tensor.long, torch.Tensor.to, torch.Tensor.detach,
}  # fmt: skip
_VIEWING = {
    torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.unflatten, torch.unflatten, torch.Tensor.expand,
}  # fmt: skip
_BACK = {
    torch.Tensor.index_add_, torch.Tensor.index_add, torch.index_add, torch.Tensor.index_put_, torch.Tensor.index_put,
    torch.index_put, torch.Tensor.scatter_add_, torch.Tensor.scatter_add, torch.scatter_add, torch.Tensor.__setitem__,
}  # fmt: skip
"""These write rows back: their results are not rows."""
