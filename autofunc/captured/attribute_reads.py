"""The attributes that a module's forward reads: an export fixes their values."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType, NoneType
from typing import Any

from torch import Tensor, nn

from autofunc.captured.kept_buffers import content_of, writes_of
from autofunc.fingerprint import Fingerprint, Fingerprinted
from autofunc.installed import is_installed

_PLAIN = (int, float, str, NoneType)
_OF_EVERY_MODULE = frozenset((*dir(nn.Module), *vars(nn.Module()))) - {"forward"}


class Reads(Fingerprinted):
    """Attributes of modules and of their classes that were read; the fingerprint changes when one of them does.

    It leaves out parts, parameters and buffers; modes, since a capture sets them; and what classes of installed libraries
    define.

    Args:
        parts: the name of each part, by `id`.
    """

    def __init__(self, parts: Mapping[int, str]) -> None:
        self._parts = parts
        self._names: dict[int, tuple[Any, str, dict[str, None]]] = {}  # by id of the owner: it, its title, and names

    def __len__(self) -> int:
        return sum(len(names) for _, _, names in self._names.values())

    def fingerprint(self, keys: Fingerprint) -> Hashable:
        """The current values; for a library's object, such as a configuration, the plain ones in it."""
        found: list[Hashable] = []
        objects: dict[int, Any] = {}
        for owner, what, names in self._names.values():
            values = _noted(keys, what, vars(owner), list(names))
            found.append(tuple((name, _key(keys, what, name, _inside(value))) for name, value in values.items()))
            objects |= {id(value): value for value in values.values() if _is_object(value)}
        for value in objects.values():
            names_in = [name for name, part in vars(value).items() if isinstance(part, _PLAIN)]
            plain = _noted(keys, type(value).__name__, vars(value), names_in)
            found.append(tuple((name, keys.of(part)) for name, part in plain.items()))
        return tuple(found)

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Inside, note every attribute that is read of any part."""
        plain, before = nn.Module.__getattribute__, vars(nn.Module).get("__getattribute__")

        def noticed(module: nn.Module, name: str) -> Any:
            if name not in _OF_EVERY_MODULE and id(module) in self._parts:
                self._notice(module, name)
            return plain(module, name)

        nn.Module.__getattribute__ = noticed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            if before is not None:  # nested in another
                nn.Module.__getattribute__ = before  # type: ignore[method-assign]
            else:
                del nn.Module.__getattribute__  # back to that of every object

    def _notice(self, module: nn.Module, name: str) -> None:
        own = object.__getattribute__(module, "__dict__")
        if name in own:
            if not isinstance(own[name], nn.Module):
                self._add(module, f"{self._parts[id(module)] or 'the module'} ({type(module).__name__})", name)
            return
        owner = next((each for each in type(module).__mro__ if name in vars(each)), None)
        if owner is not None and not _is_of_a_library(owner):
            self._add(owner, owner.__name__, name)

    def _add(self, owner: Any, what: str, name: str) -> None:
        self._names.setdefault(id(owner), (owner, what, {}))[2][name] = None


def _noted(keys: Fingerprint, what: str, space: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the values of some names, which are watched from now on."""
    keys.note(what, names, lambda: [space.get(name) for name in names])
    return {name: space.get(name) for name in names}


def _key(keys: Fingerprint, what: str, name: str, value: Any) -> Hashable:
    """Return a value's key; a tensor's is of its values, which may be written to."""
    if not isinstance(value, Tensor):
        return keys.of(value)
    keys.note(what, [name], lambda: [writes_of(value)])
    return content_of(value)


def _inside(value: Any) -> Any:
    """Return the function in a property or another descriptor."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod, MethodType)) else value


def _is_object(value: Any) -> bool:
    """True if a value has attributes, which `Fingerprint` ignores if a library defines its class."""
    known = (type, FunctionType, MethodType, property, staticmethod, classmethod, Tensor, nn.Module)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, known)


def _is_of_a_library(owner: type) -> bool:
    try:
        return is_installed(inspect.getfile(owner))
    except (TypeError, OSError):  # defined in a notebook, or built in
        return owner.__module__ == "builtins"
