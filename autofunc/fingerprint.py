"""Keys of functions and what they close over: equal keys mean the same computation.

Two functions are the same if their code, their defaults, the values in their closures, and the globals they name are the
same, including what they name in the user's modules and classes. Values that cannot be compared by value are compared by
identity, so one function is never mistaken for another; at worst its work is repeated. For instances of the user's classes,
`nn.Module`s and namespaces, the attributes count too. As in `jax.jit`, anything else compared by identity is assumed not to
change: a tensor, an object of an installed library.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from operator import is_
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from autofunc.cache import Identity
from autofunc.installed import is_installed

_PLAIN = (int, complex, bool, bytes, type(None), type(...), torch.dtype, torch.device)
_OPEN = (nn.Module, SimpleNamespace, Namespace)  # not the user's classes, but their attributes count


@dataclass(frozen=True)
class Name:
    """A text that names a place in the model; equal layers differ only in it."""

    text: str


class Fingerprinted:
    """Base of classes that compute their own key."""

    def fingerprint(self, keys: Fingerprint) -> Hashable:
        """Return the key, with the keys of parts from `keys.of`."""
        raise NotImplementedError


class Place(NamedTuple):
    """A container that a key was made from; it has changed if its members are different objects."""

    what: str
    names: Sequence[Any] | None  # of its members, for messages; None: they are numbered
    members: Callable[[], Iterable[Any]]
    before: tuple[Any, ...]

    @property
    def is_unchanged(self) -> bool:
        """True if the members are the same objects as before. Fast, because every step asks."""
        now = tuple(self.members())
        return len(now) == len(self.before) and all(map(is_, now, self.before))


class Fingerprint:
    """Computes keys of values. A layer's own name is replaced by its label, so that equal layers have equal keys.

    Args:
        name: the layer's name.
        label: its replacement.
        literal: only a `Name` counts as a name; strings stay as they are.
        places: receives the containers that keys were made from and that may change.
    """

    def __init__(
        self, name: str = "", label: str = "", *, literal: bool = False, places: list[Place] | None = None
    ) -> None:  # fmt: skip
        self._name, self._label, self._literal, self._places = name, label, literal, places
        self._seen: dict[int, tuple[int, object]] = {}  # id -> number, and the object, which keeps its id from being reused

    def literally(self) -> Fingerprint:
        """Return a copy for values in which only a `Name` counts as a name."""
        return Fingerprint(self._name, self._label, literal=True, places=self._places)

    def note(self, what: str, names: Sequence[Any] | None, members: Callable[[], Iterable[Any]]) -> None:
        """Record that a key was made from these members, which may change later."""
        if self._places is not None:
            self._places.append(Place(what, names, members, tuple(members())))

    def of(self, value: Any) -> Hashable:
        """Return the key of a value."""
        if isinstance(value, Name):
            return Name, self._labelled(value.text)
        if isinstance(value, str):
            return str, value if self._literal else self._labelled(value)
        if isinstance(value, float):
            return float, value.hex()  # 0.0 == -0.0
        if isinstance(value, _PLAIN):
            return type(value), value
        if id(value) in self._seen:  # repeated, or inside itself
            return "again", self._seen[id(value)][0]
        self._seen[id(value)] = len(self._seen), value
        return self._composite(value)

    def _labelled(self, text: str) -> str:
        if self._name and (text == self._name or text.startswith(self._name + ".")):
            return self._label + text[len(self._name) :]
        return text

    def _composite(self, value: Any) -> Hashable:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return "method", self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, partial):
            return "partial", self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, Fingerprinted):
            return type(value), value.fingerprint(self)
        if isinstance(value, list):
            self.note("a list", None, lambda: value)
        if isinstance(value, (list, tuple)):
            return Identity(type(value)), tuple(self.of(part) for part in value)
        if isinstance(value, (set, frozenset)):
            self.note("a set", None, lambda: value)
            return type(value), frozenset(self.of(part) for part in value)
        if isinstance(value, slice):
            return slice, self.of((value.start, value.stop, value.step))
        if isinstance(value, dict):
            self.note("a dict", [*value], lambda: (*value, *value.values()))
            return Identity(type(value)), tuple((self.of(name), self.of(part)) for name, part in value.items())
        if is_dataclass(value) and not isinstance(value, type):
            names = [each.name for each in fields(value)]
            self.note(type(value).__name__, names, lambda: [getattr(value, name) for name in names])
            return Identity(type(value)), tuple(self.of(getattr(value, each.name)) for each in fields(value))
        if isinstance(value, _OPEN) or (_is_own(type(value)) and hasattr(value, "__dict__")):
            inside = vars(value)
            self.note(type(value).__name__, [*inside], inside.values)
            return Identity(value), tuple((self.of(name), self.of(part)) for name, part in inside.items())
        return Identity(value)

    def _function(self, value: FunctionType) -> Hashable:
        what, cells = value.__name__, value.__closure__ or ()
        inside = [_content(cell) for cell in cells]
        if cells:
            self.note(what, value.__code__.co_freevars, lambda: [_content(cell) for cell in cells])
        around = {} if is_installed(value.__code__.co_filename) else globals_named_by(value)
        if around:
            spaces = [_space_of(value, name) for name in around]
            self.note(what, [*around], lambda: [space.get(name) for space, name in spaces])
        defaults = value.__defaults__, value.__kwdefaults__
        parts = (tuple(self.of(part) for part in each) for each in (inside, defaults, around.values()))
        return value.__code__, tuple(around), *parts


def _content(cell: Any) -> Any:
    """Return the content of a closure's cell; an empty cell stands for itself."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def globals_named_by(function: FunctionType) -> Mapping[str, Any]:
    """Return the globals that a function and its inner functions name, and what they name in the user's modules and types.

    Returns:
        Name -> value; names in a module or class look like `config.width`.
    """
    names, space = list(dict.fromkeys(_names_in(function.__code__))), function.__globals__
    found = {name: space[name] for name in names if name in space}
    for owner, value in list(found.items()):
        if isinstance(value, (type, ModuleType)) and _is_own(value):
            found.update({f"{owner}.{name}": vars(value)[name] for name in names if name in vars(value)})
    return found


def _space_of(function: FunctionType, name: str) -> tuple[Mapping[str, Any], str]:
    """Return the namespace in which `globals_named_by` finds a name, and the name there."""
    owner, _, inner = name.rpartition(".")
    return (vars(function.__globals__[owner]), inner) if owner else (function.__globals__, name)


def _is_own(value: type | ModuleType) -> bool:
    """Return whether a class or module is the user's."""
    module = value if isinstance(value, ModuleType) else sys.modules.get(value.__module__)
    if module is None or module.__name__ == "builtins":
        return False
    file = getattr(module, "__file__", None)
    return file is None or not is_installed(file)  # a notebook has no file


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
