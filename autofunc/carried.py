"""The state an object keeps between calls, as a flat dict of tensors, and restored into a new object.

Keys tell what each value is: `k (int)`, `inner (list).0 (object).state (dict).@h~weight (dict).exp_avg`. Reading them runs
no code. Anything that isn't data, such as a function or a dtype, stays with the object, and may not change.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError

Flat = dict[str, Tensor]
_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
_FIXED = (
    FunctionType, BuiltinFunctionType, MethodType, ModuleType, type, torch.dtype, torch.device, torch.layout, Enum,
    logging.Logger,
)  # fmt: skip
_MARK = "()"  # key of a container's number of members


class Carrier:
    """Takes objects apart and restores them. Tensors in `names` are referred to by name and stay where they are.

    Args:
        names: tensors that are not state, such as parameters.
        skipped: returns True for an object's attributes that are not state.
    """

    def __init__(
        self, names: Mapping[str, Tensor], skipped: Callable[[Any, str], bool] = lambda value, name: False
    ) -> None:
        self._named, self._skipped = {name.replace(".", "~"): leaf for name, leaf in names.items()}, skipped
        self._names = {id(leaf): name for name, leaf in self._named.items()}

    def apart(self, what: str, value: Any) -> tuple[Flat, dict[str, Any]]:
        """Return a value's tensors and plain values by key, and stand-ins for the rest by key: equal while unchanged.

        Args:
            what: first part of the keys, without dots.
            value: of any type.
        """
        flat: Flat = {}
        fixed: dict[str, Any] = {}
        for key, part in self._parts(what, value, ()):
            (flat if isinstance(part, Tensor) else fixed)[key] = part
        return flat, fixed

    def _parts(self, key: str, value: Any, inside: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        if id(value) in self._names:
            yield key, self._names[id(value)]
        elif id(value) in inside:
            yield key, id(value)
        elif isinstance(value, Tensor):
            yield key, value
        elif value is None:
            yield f"{key} (none)", torch.empty(0)
        elif type(value) in _NUMBERS:
            yield f"{key} ({type(value).__name__})", _number(key, value)
        elif type(value) is str:
            yield f"{key} (str)", torch.tensor([*value.encode()], dtype=torch.uint8)
        elif isinstance(value, (list, tuple, dict)):
            folder = f"{key} ({_kind(value)})"
            yield f"{folder}.{_MARK}", torch.tensor(len(value))
            for token, member in self._members(key, value):
                yield from self._parts(f"{folder}.{token}", member, (*inside, id(value)))
        elif isinstance(value, torch.Generator):
            yield f"{key} (generator)", value.get_state()
        elif isinstance(value, _FIXED) or not isinstance(getattr(value, "__dict__", None), dict):
            yield key, _stand_in(value)
        else:
            for name, member in vars(value).items():
                if not self._skipped(value, name):
                    yield from self._parts(f"{key} (object).{_text(name)}", member, (*inside, id(value)))

    def _members(self, what: str, value: Any) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield from ((str(number), member) for number, member in enumerate(value))
            return
        for key, member in value.items():
            if id(key) in self._names:
                yield f"@{self._names[id(key)]}", member
            elif type(key) in (str, int):
                yield f"={key}" if type(key) is int else _text(str(key)), member
            else:
                raise ModelError(
                    f"{what} is a dict with a key of type {type(key).__name__}; expected str, int or parameters"
                )

    def together(self, what: str, flat: Mapping[str, Tensor], existing: Any) -> Any:
        """Restore the value that `apart(what, value)` took apart.

        Args:
            what: first part of the keys.
            flat: the tensors by key; those missing are taken from `existing`.
            existing: the value in a new object: its containers are filled in place, and values that aren't data kept.
        """
        return self._joined(tree.nest(flat), what, existing)

    def _joined(self, node: Mapping[str, Any], name: str, existing: Any) -> Any:
        if isinstance(node.get(name), Tensor):
            return node[name]
        token = next((each for each in node if each.startswith(f"{name} (")), None)
        if token is None:
            return existing  # not data, or a container without any
        kind, inner = token.removeprefix(f"{name} (").removesuffix(")"), node[token]
        if kind == "none":
            return None
        if kind == "str":
            return bytes(inner.tolist()).decode()
        if kind == "generator":
            existing.set_state(inner)
            return existing
        if kind == "object":
            for member in dict.fromkeys((*vars(existing), *(_plain(each) for each in inner))):
                if not self._skipped(existing, member):
                    vars(existing)[member] = self._joined(inner, _text(member), vars(existing).get(member))
            return existing
        if kind in ("list", "tuple"):
            known = list(existing) if isinstance(existing, (list, tuple)) else []
            count = int(inner.get(_MARK, len(known)))
            known += [None] * (count - len(known))
            joined = [self._joined(inner, str(number), known[number]) for number in range(count)]
            if isinstance(existing, list):
                existing[:] = joined
                return existing
            return joined if kind == "list" else tuple(joined)
        if kind == "dict":
            return self._joined_dict(inner, existing)
        return inner.item()

    def _joined_dict(self, inner: Mapping[str, Any], existing: Any) -> dict[Any, Any]:
        made = existing if isinstance(existing, dict) else {}
        if _MARK in inner and int(inner[_MARK]) == 0:
            made.clear()
        tokens = {token: key for key in made for token, _ in self._members("", {key: None})}
        for token in inner:
            name = token.partition(" (")[0]
            if name == _MARK or name in tokens:
                continue
            if not name.startswith("@"):
                tokens[name] = int(name[1:]) if name.startswith("=") else _plain(name)
            elif name[1:] in self._named:
                tokens[name] = self._named[name[1:]]
        values = {key: self._joined(inner, name, made.get(key)) for name, key in tokens.items()}
        made.clear()
        made.update(values)
        return made


def _kind(value: Any) -> str:
    return next(kind.__name__ for kind in (list, tuple, dict) if isinstance(value, kind))


def _number(key: str, value: Any) -> Tensor:
    try:
        return torch.tensor(value, dtype=_NUMBERS[type(value)])
    except (OverflowError, RuntimeError) as error:
        raise ModelError(f"{key} is {value}, which does not fit into 64 bits; keep it as a float or a tensor") from error


def _stand_in(value: Any) -> Any:
    """Stand in for a value that isn't data: its pickled bytes, which reveal a changed counter, else its identity."""
    if isinstance(value, _FIXED):
        return id(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pickle.dumps(value)
    except Exception:  # a foreign object may raise anything when pickled
        return id(value)


_ESCAPES = (("~", "~0"), (".", "~1"), (" (", "~2"), (")", "~3"))


def _text(name: str) -> str:
    """Return a name as part of a key, in quotes if it could be mistaken for something else."""
    escaped = name
    for text, instead in _ESCAPES:
        escaped = escaped.replace(text, instead)
    return name if escaped == name and name and name[0] not in "@='" else f"'{escaped}"


def _plain(token: str) -> str:
    """Return the name from a token of `_text`."""
    name = token.partition(" (")[0]
    if not name.startswith("'"):
        return name
    for text, instead in reversed(_ESCAPES):
        name = name.replace(instead, text)
    return name[1:]


def is_plain(key: str) -> bool:
    """Return whether a key of `Carrier.apart` belongs to a plain value, such as a number, and not to a tensor."""
    return key.endswith(")")
