"""A module is captured as a pure function: whatever its forward leaves behind in it is undone, and refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from autofunc.errors import ModelError

_STATE = ("_parameters", "_buffers", "_modules")
_CACHES = ("_flat_weights", "_flat_weight_refs")
"""Lists of its own parameters that a recurrent layer of torch keeps, and makes anew when they are others."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
"""Where libraries put hooks when forward first runs; they are removed again."""


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Put back every attribute of every submodule afterwards, the same objects with the same contents."""
    before = [(part, _contents(part)) for part in module.modules()]
    try:
        yield
    finally:
        for part, contents in before:
            _put_back(part, contents)


@contextmanager
def left_as_it_was(module: nn.Module, what: str) -> Iterator[None]:
    """Refuse a forward that changes an attribute of any submodule, and undo it. Hooks and private flags are undone only.

    Raises:
        ModelError: naming the class and the attribute.
    """
    before = {name: (part, _contents(part)) for name, part in module.named_modules()}
    changed: list[str] = []
    try:
        yield
    finally:
        for name, (part, contents) in before.items():
            flags = {key for key, value in vars(part).items() if key.startswith("_") and isinstance(value, bool)}
            caches = set(_CACHES if isinstance(part, nn.RNNBase) else ())
            for attribute in set(_put_back(part, contents)) - flags - set(_HOOKS) - caches:
                changed.append(f"{type(part).__name__} ({name or 'the module itself'}) stores {attribute!r}")
    if changed:
        raise ModelError(
            f"{what} keeps state from one forward to the next: {'; '.join(changed[:5])}. Microbatches overlap in a "
            "pipeline, and a captured forward would do it only once; return it, or compute it in __init__"
        )


def _contents(part: nn.Module) -> dict[str, Any]:
    """Its attributes, with copies of the containers that it owns."""
    return {name: (value, _copy(value)) for name, value in vars(part).items()}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, set)) else None


def _put_back(part: nn.Module, contents: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Restore the attributes; returns the names of those that had changed."""
    now, changed = vars(part), []
    for name in [name for name in now if name not in contents]:
        del now[name]
        changed.append(name)
    for name, (value, copy) in contents.items():
        if now.get(name) is not value:
            changed.append(name)
            now[name] = value
        if copy is not None and not _same(value, copy):
            changed += [name] if name not in _STATE else _differing(value, copy)
            _refill(value, copy)
    return list(dict.fromkeys(changed))


def _same(value: Any, copy: Any) -> bool:
    if isinstance(value, set):
        return value == set(copy)
    if isinstance(value, dict):
        return value.keys() == copy.keys() and all(value[key] is copy[key] for key in copy)
    return len(value) == len(copy) and all(one is other for one, other in zip(value, copy, strict=True))


def _differing(value: Mapping[str, Any], copy: Mapping[str, Any]) -> list[str]:
    return [key for key in {**value, **copy} if value.get(key) is not copy.get(key)]


def _refill(value: Any, copy: Any) -> None:
    value.clear()
    if isinstance(value, list):
        value.extend(copy)
    else:
        value.update(copy)
