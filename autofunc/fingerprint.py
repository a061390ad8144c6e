"""Keys of functions and what they close over: equal keys mean the same computation.

Two functions are the same when their code, defaults, the values in their closures and of the globals that they name are,
and of what they name in modules and classes of the user's. What cannot be compared by value is compared by identity, so
that a function is never taken for another by mistake; at worst its work is done once more. Of an instance of a user's
class, or of an `nn.Module`, the attributes count too. As with `jax.jit`, anything else that is compared by identity is
taken to stay as it is: a tensor, an object of an installed library.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from autofunc.cache import Identity

_PLAIN = (int, complex, bool, bytes, type(None), type(...), torch.dtype, torch.device)
_LIBRARIES = (sysconfig.get_paths()["stdlib"], str(Path(__file__).parent))


@dataclass(frozen=True)
class Name:
    """A text that names a place in the model: equal layers differ in it."""

    text: str


class Fingerprinted:
    """Base of what makes a key of itself."""

    def fingerprint(self, keys: Fingerprint) -> Hashable:
        """The key, with the keys of parts made by `keys.of`."""
        raise NotImplementedError


class Fingerprint:
    """Makes keys of values. A layer's own name counts as its label, so that equal layers have equal keys.

    Args:
        name: of the layer.
        label: what stands for it.
        literal: only a `Name` is a name; strings are what they are.
    """

    def __init__(self, name: str = "", label: str = "", *, literal: bool = False) -> None:
        self._name, self._label, self._literal = name, label, literal
        self._seen: dict[int, tuple[int, object]] = {}  # by id: number, and the object, so that no other takes its id

    def literally(self) -> Fingerprint:
        """The same, for values in which only a `Name` is a name."""
        return Fingerprint(self._name, self._label, literal=True)

    def of(self, value: Any) -> Hashable:
        """The key of a value."""
        if isinstance(value, Name):
            return Name, self._labelled(value.text)
        if isinstance(value, str):
            return str, value if self._literal else self._labelled(value)
        if isinstance(value, float):
            return float, value.hex()  # 0.0 == -0.0
        if isinstance(value, _PLAIN):
            return type(value), value
        if id(value) in self._seen:  # once more, or inside itself
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
        if isinstance(value, (list, tuple)):
            return Identity(type(value)), tuple(self.of(part) for part in value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self.of(part) for part in value)
        if isinstance(value, slice):
            return slice, self.of((value.start, value.stop, value.step))
        if type(value) is dict:
            return dict, tuple((self.of(name), self.of(part)) for name, part in value.items())
        if is_dataclass(value) and not isinstance(value, type):
            return Identity(type(value)), tuple(self.of(getattr(value, each.name)) for each in fields(value))
        if isinstance(value, nn.Module) or (_is_own(type(value)) and hasattr(value, "__dict__")):
            return Identity(value), self.of(dict(vars(value)))
        return Identity(value)

    def _function(self, value: FunctionType) -> Hashable:
        inside = [_content(cell) for cell in value.__closure__ or ()]
        around = {} if is_installed(value.__code__.co_filename) else globals_named_by(value)
        return value.__code__, self.of(inside), self.of([value.__defaults__, value.__kwdefaults__]), self.of(around)


def _content(cell: Any) -> Any:
    """What a cell of a closure holds; one that is not filled yet is itself."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def is_installed(filename: str) -> bool:
    """Whether code belongs to Python, to an installed package or to this library: what is named there stays as it is."""
    return filename.startswith(_LIBRARIES) or not {"site-packages", "dist-packages"}.isdisjoint(Path(filename).parts)


def globals_named_by(function: FunctionType) -> Mapping[str, Any]:
    """What a function, and functions defined in it, name among globals, and in the user's modules and classes among these.

    Returns:
        Name -> value; `config.width` for what is named in a module or class.
    """
    names, space = list(dict.fromkeys(_names_in(function.__code__))), function.__globals__
    found = {name: space[name] for name in names if name in space}
    for owner, value in list(found.items()):
        if isinstance(value, (type, ModuleType)) and _is_own(value):
            found.update({f"{owner}.{name}": vars(value)[name] for name in names if name in vars(value)})
    return found


def _is_own(value: type | ModuleType) -> bool:
    """Whether a class or module is the user's."""
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
