"""Where a forward turns values into plain numbers or shapes: `if`, `assert`, `.item()`, bounds of slices, `h[mask]`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autofunc.fake import is_own, user_line
from autofunc.installed import is_of_torch

Kind = Literal["bool", "int", "float", "rows"]


@dataclass(frozen=True)
class Place:
    """Where a value is read in the user's code; equal for the same chain of calls at the same lines."""

    line: str  # file, number and text
    calls: tuple[tuple[str, int | None], ...]  # files and numbers of the lines that lead there from forward


@dataclass(frozen=True)
class Decision:
    """A value that was read from a tensor on the example batch."""

    place: Place
    kind: Kind  # the type its one element was read as; "rows": the number of true elements in each of its rows
    value: Any  # that of the element; for "rows", a tuple
    dims: int = 0  # number of dims of the tensor read


class Conversions(TorchFunctionMode):
    """Inside, every read of a tensor's values goes through `value` or `places`.

    Reads inside torch's own functions do not.
    """

    def value(self, kind: Kind, found: Tensor) -> Any:
        """Return the value to use for one that is read.

        Args:
            kind: the type the one element is read as.
            found: the tensor read.
        """
        raise NotImplementedError

    def places(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Return where a mask is true, like `mask.nonzero(as_tuple=True)`, with a known size.

        Args:
            mask: bool, with at least one dim.
        """
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not reads_values(func, args, kwargs):
            return func(*args, **kwargs)
        if func in _COMPARING:
            found = _COMPARING[func](*args, **kwargs)
            return found is not None and self.value("bool", found)
        if func in _READING:
            return self._read(func, args[0])
        if func in _NONZERO:
            places = self.places(args[0] if args[0].dtype == torch.bool else torch.ne(args[0], 0))
            as_tuple = func is torch.where or kwargs.get("as_tuple", False)
            return places if as_tuple else torch.stack(places, 1)
        if func in _SELECTING:
            shape = torch.logical_or(*args).shape
            whole, mask = (each.expand(shape) for each in args)
            return whole[self.places(mask)]
        if func in _UNIQUE:
            return self._unique(args[0].flatten())
        if func in _REPEATING:
            return self._repeat(func, args, kwargs)
        if func is torch.tensor:
            return torch.stack([*args[0]]).to(kwargs.get("device"))
        if func in _INDEXING:
            return func(args[0], self._index(args[1], masks=_takes_places(func, args)), *args[2:])
        return func(*map(self._size, args), **{name: self._size(argument) for name, argument in kwargs.items()})

    def _unique(self, values: Tensor) -> Tensor:
        """Return the first value of each run of equal ones: a single one if all are equal, whatever their value."""
        if self.value("bool", (values == values[:1]).all()):
            return values[:1]
        begins = torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])
        return values[self.places(begins)]

    def _repeat(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Repeat elements as often as a tensor says, with a known size."""
        repeats = _repeats(args, kwargs)
        total = self.value("int", repeats.sum())
        if repeats.numel() == 1 and len(args) + len(kwargs) > 1:  # every element equally often
            dim = args[2] if len(args) > 2 else kwargs.get("dim")
            total *= args[0].numel() if dim is None else args[0].shape[dim]
        found: Tensor = func(*args, **(kwargs | {"output_size": total}))
        return found

    def _read(self, func: Any, found: Tensor) -> Any:
        if func is torch.Tensor.tolist and found.dim():  # one element at a time, as fake tensors do
            return [self._read(func, part) for part in found.unbind()]
        wanted = _READING[func]
        kind = _kind_of(found) if wanted in (None, float) else "bool" if wanted is bool else "int"
        if wanted is None and kind == "float":
            return found.detach().reshape(())  # a tensor can stand for the number; comparing it is the decision
        value = self.value(kind, found)
        return value if wanted is None else wanted(value)

    def _index(self, index: Any, *, masks: bool) -> Any:
        """Replace masks in an index by places, and the bounds of slices by plain numbers."""
        found: list[Any] = []
        for part in _parts(index):
            if masks and _is_mask(part):
                found += self.places(part)
            elif isinstance(part, slice):
                found.append(slice(*map(self._size, (part.start, part.stop, part.step))))
            else:
                found.append(part)
        return tuple(found)

    def _size(self, argument: Any) -> Any:
        """Return a size, or several, as plain numbers."""
        if isinstance(argument, (list, tuple)):
            return [self._size(part) for part in argument]
        return self._read(torch.Tensor.__index__, argument) if _is_number(argument) else argument


def here() -> Place:
    """Return the place in the user's code that is running, and the calls from forward to it."""
    frames = traceback.extract_stack()
    inner = list(dropwhile(is_own, reversed(frames)))  # without our own frames on top
    calls = takewhile(lambda frame: not is_own(frame), inner)
    return Place(user_line(frames), tuple((each.filename, each.lineno) for each in calls if not is_of_torch(each.filename)))


def reads_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """True if a call turns values of tensors into numbers or shapes."""
    if func in _READING:
        return _is_fixed(args[0]) and not _only_checked(func) and (func is torch.Tensor.tolist or args[0].numel() == 1)
    if func in _COMPARING or func in _NONZERO or func in _SELECTING or func in _UNIQUE:
        one = func not in _COMPARING and func not in _SELECTING
        given = [each for each in args if isinstance(each, Tensor)]
        plain = func in _COMPARING or not any(value for name, value in kwargs.items() if name != "as_tuple")
        return plain and len(args) == (1 if one else 2) and all(map(_is_fixed, given)) and (not one or _has_rows(given[0]))
    if func in _REPEATING:
        return isinstance(_repeats(args, kwargs), Tensor) and _is_fixed(args[0]) and kwargs.get("output_size") is None
    if func is torch.tensor:
        return isinstance(args[0], list) and bool(args[0]) and all(map(_is_number, args[0])) and kwargs.keys() <= {"device"}
    if func in _INDEXING:
        masks = _takes_places(func, args)
        return any((masks and _is_mask(part)) or _bounds(part) for part in _parts(args[1]))
    return func in _SIZED and any(_is_number(part) for each in (*args, *kwargs.values()) for part in _parts(each))


_READING: dict[Any, Any] = {  # and the type to convert to; None: the tensor's own
    torch.Tensor.__bool__: bool,
    torch.Tensor.is_nonzero: bool,
    torch.is_nonzero: bool,
    torch.Tensor.__int__: int,
    torch.Tensor.__index__: int,
    torch.Tensor.__float__: float,
    torch.Tensor.item: None,
    torch.Tensor.tolist: None,
}

_NONZERO = {torch.nonzero, torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere, torch.where}
_UNIQUE = {torch.unique_consecutive, torch.Tensor.unique_consecutive}
_SELECTING = {torch.masked_select, torch.Tensor.masked_select}

_REPEATING = {torch.repeat_interleave, torch.Tensor.repeat_interleave}
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}

_SIZED = {
    torch.arange, torch.zeros, torch.ones, torch.empty,
    torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand, torch.Tensor.repeat, torch.Tensor.narrow,
    torch.narrow, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty, torch.Tensor.new_full,
    torch.Tensor.unflatten, torch.unflatten, torch.Tensor.split, torch.split, torch.Tensor.topk, torch.topk,
}  # fmt: skip
"""These take sizes. A tensor with one integer may stand for one."""


def _equal(one: Tensor, other: Tensor) -> Tensor | None:
    return torch.eq(one, other).all() if one.shape == other.shape else None


def _close(one: Tensor, other: Tensor, **options: Any) -> Tensor:
    return torch.isclose(one, other, **options).all()


def _contains(tensor: Tensor, element: Any) -> Tensor:
    return torch.eq(tensor, element).any()


_COMPARING: dict[Any, Callable[..., Any]] = {
    torch.equal: _equal,
    torch.Tensor.equal: _equal,
    torch.allclose: _close,
    torch.Tensor.allclose: _close,
    torch.Tensor.__contains__: _contains,
}


def _repeats(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return kwargs["repeats"] if "repeats" in kwargs else args[min(len(args), 2) - 1]


def _only_checked(func: Any) -> bool:
    """True if one of torch's checks reads it, such as `torch._check_tensor_all`; captures drop those."""
    if func is not torch.Tensor.item:
        return False
    reader = next(dropwhile(is_own, reversed(traceback.extract_stack())))
    return is_of_torch(reader.filename) and reader.name.startswith("_check")


def _is_fixed(tensor: Any) -> bool:
    """True for a real tensor whose sizes are known."""
    return (
        isinstance(tensor, Tensor)
        and not tensor.is_complex()
        and not any(isinstance(size, torch.SymInt) for size in tensor.shape)
    )


def _is_mask(value: Any) -> bool:
    return _is_fixed(value) and value.dtype == torch.bool and value.dim() > 0


def _is_number(value: Any) -> bool:
    """True if it stands for a plain integer where one is expected."""
    return _is_fixed(value) and _kind_of(value) == "int" and value.dim() == 0


def _bounds(part: Any) -> bool:
    return isinstance(part, slice) and any(map(_is_number, (part.start, part.stop, part.step)))


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else [value]


def _takes_places(func: Any, args: Sequence[Any]) -> bool:
    """True if a mask among the indices decides a shape; not when one number is written wherever the mask is true."""
    return func is torch.Tensor.__getitem__ or (isinstance(args[2], Tensor) and args[2].dim() > 0)


def _has_rows(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and tensor.numel() > 0


def _kind_of(tensor: Tensor) -> Kind:
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "int"
