"""A memory of all that a module holds: what has changed since, and how to restore it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["parameter", "buffer", "attribute"]

_REGISTERED: dict[str, Kind] = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "attribute"}
_DEEPEST = 4  # levels of objects inside an attribute that are searched
_AS_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize: wide integers compare several times as fast
_CACHES = ("_flat_weights", "_flat_weight_refs")
"""Lists of its own parameters that a recurrent layer of torch keeps, and rebuilds when parameters are replaced."""

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""Where libraries put hooks when forward first runs; they are removed afterwards."""

_OPAQUE = (type, FunctionType, MethodType, ModuleType, torch.device, torch.dtype, torch.Size)


@dataclass(frozen=True)
class Change:
    """One changed attribute of one part of a module."""

    module: str
    attribute: str
    kind: Kind
    how: How


How = Literal["set", "written", "noted"]
"""Another object; the same one with other contents; or an object, such as a config, in which a plain value changed."""


@dataclass(frozen=True)
class _Place:
    module: str
    attribute: str  # empty for the attributes themselves
    kind: Kind = "attribute"
    by_key: bool = False  # a dict whose keys count as attributes too
    is_object: bool = False  # the attributes of an object other than a module


@dataclass(frozen=True)
class _Held:
    place: _Place
    tensor: Tensor
    data: Tensor  # the same memory
    clone: Tensor
    grad: Tensor | None
    is_leaf: bool
    requires_grad: bool


class Snapshot:
    """A module's attributes and everything in them: containers, plain objects, tensors and generators.

    Args:
        module: the module to remember.
        values: whether to keep values too: of tensors, which takes as much memory as the module, and of generators. Without
            them it knows which tensors there are, not their contents, and the module may be on the meta device.
    """

    def __init__(self, module: nn.Module, *, values: bool) -> None:
        self._values = values
        self._containers: list[tuple[_Place, Any, Any]] = []
        self._tensors: list[_Held] = []
        self._generators: list[tuple[_Place, torch.Generator, Tensor]] = []
        self._seen: set[int] = set()
        self._parts = dict(module.named_modules())
        self._registered = {id(part) for part in self._parts.values()}
        for name, part in self._parts.items():  # first, so that tensors go by these names wherever else they are kept
            for registered, kind in _REGISTERED.items():
                self._container(_Place(name, registered, kind, by_key=True), vars(part)[registered], 0)
        for name, part in self._parts.items():
            self._container(_Place(name, ""), vars(part), 0)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, wherever it is kept, once each."""
        return [held.tensor for held in self._tensors]

    def changes(self) -> list[Change]:
        """Return the differences since the snapshot, each attribute once.

        Changes that affect no value are left out: hooks and private flags, which libraries set when forward first runs, and
        caches of torch's recurrent layers.
        """
        found: dict[tuple[str, str], Change] = {}

        def note(place: _Place, attribute: str, how: How) -> None:
            key = (place.module, attribute)
            if key not in found or found[key].how == "noted":
                found[key] = Change(place.module, attribute, place.kind, how)

        for place, container, copy in self._containers:
            if not place.attribute or place.by_key:
                for key in _differing(container, copy):
                    note(place, str(key), "set")
            elif not _same_members(container, copy):
                plain = place.is_object and all(_is_plain(container.get(key)) for key in _differing(container, copy))
                note(place, place.attribute, "noted" if plain else "written")
        for held in self._tensors:
            moved = held.tensor.data_ptr() != held.data.data_ptr()
            if moved or held.tensor.requires_grad != held.requires_grad or not same_bits(held.tensor.detach(), held.clone):
                note(held.place, held.place.attribute, "written")
        for place, generator, state in self._generators:
            if not torch.equal(generator.get_state(), state):
                note(place, place.attribute, "written")
        return [change for change in found.values() if not _is_housekeeping(self._parts[change.module], change.attribute)]

    def left(self) -> list[tuple[Any, Any]]:
        """Return the containers that changed since the snapshot, with copies of their current contents, for `put_back`."""
        return [
            (container, _copy(container)) for _, container, copy in self._containers if not _same_objects(container, copy)
        ]

    def restore(self) -> None:
        """Restore everything: the same objects with the same contents."""
        for _, container, copy in self._containers:
            if not _same_objects(container, copy):
                _refill(container, copy)
        for held in self._tensors:
            tensor, data = held.tensor, held.data
            if held.is_leaf and not tensor.is_leaf:
                tensor.detach_()  # something with a history was written into it
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.data = data
            if not same_bits(data, held.clone):
                data.copy_(held.clone)  # the tensor itself may require a gradient
            if held.is_leaf and tensor.grad is not held.grad:
                tensor.grad = held.grad
            if held.is_leaf and tensor.requires_grad != held.requires_grad:
                tensor.requires_grad_(held.requires_grad)
        for _, generator, state in self._generators:
            generator.set_state(state)

    def _container(self, place: _Place, value: Any, depth: int) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        copy = _copy(value)
        self._containers.append((place, value, copy))
        for key, member in copy.items() if isinstance(copy, dict) else enumerate(copy):
            named = not place.attribute or place.by_key
            inner = _Place(place.module, str(key), place.kind) if named else replace(place, is_object=False)
            self._member(inner, member, depth)

    def _member(self, place: _Place, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            if self._values and id(value) not in self._seen and _has_memory(value):
                self._seen.add(id(value))
                data, grad = value.detach(), value.grad if value.is_leaf else None
                self._tensors.append(_Held(place, value, data, data.clone(), grad, value.is_leaf, value.requires_grad))
        elif isinstance(value, torch.Generator):
            if self._values:
                self._generators.append((place, value, value.get_state()))
        elif isinstance(value, (dict, list, set, deque)):
            self._container(place, value, depth)
        elif isinstance(value, tuple):
            for member in value:
                self._member(place, member, depth)
        elif isinstance(value, nn.Module):
            if id(value) not in self._registered:  # registered ones have their own entry
                self._container(place, vars(value), depth)
        elif depth < _DEEPEST and not isinstance(value, _OPAQUE) and isinstance(getattr(value, "__dict__", None), dict):
            self._container(replace(place, is_object=True), value.__dict__, depth + 1)


def put_back(left: list[tuple[Any, Any]]) -> None:
    """Fill containers with the contents they had when `Snapshot.left` was called."""
    for container, copy in left:
        _refill(container, copy)


def storage_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory; None if it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # sparse, or a tracer's stand-in
        return None


def _is_housekeeping(part: nn.Module, attribute: str) -> bool:
    is_flag = attribute.startswith("_") and isinstance(vars(part).get(attribute), bool)
    return is_flag or attribute in _HOOKS or (attribute in _CACHES and isinstance(part, nn.RNNBase))


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, so that NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) if one.is_quantized else torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(_AS_BITS.get(tensor.dtype.itemsize, torch.uint8))


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, deque)) else set(value)


def _refill(value: Any, copy: Any) -> None:
    value.clear()
    if isinstance(value, (dict, set)):
        value.update(copy)
    else:
        value.extend(copy)


def _same_objects(value: Any, copy: Any) -> bool:
    if isinstance(value, set):
        return bool(value == copy)
    if isinstance(value, dict):
        return list(value) == list(copy) and all(value[key] is copy[key] for key in copy)
    return len(value) == len(copy) and all(one is other for one, other in zip(value, copy, strict=True))


def _same_members(value: Any, copy: Any) -> bool:
    if isinstance(value, dict):
        return not _differing(value, copy)
    if isinstance(value, set):
        return bool(value == copy)
    return len(value) == len(copy) and all(_same(one, other) for one, other in zip(value, copy, strict=True))


def _differing(value: Any, copy: Any) -> list[Any]:
    missing = object()
    return [key for key in {**copy, **value} if not _same(value.get(key, missing), copy.get(key, missing))]


def _same(one: Any, other: Any) -> bool:
    """True for the same object, and for equal plain values."""
    return one is other or (_is_plain(one) and type(one) is type(other) and bool(one == other))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_is_plain(member) for member in value)
    return value is None or isinstance(value, (int, float, complex, str, bytes, torch.dtype, torch.device))
