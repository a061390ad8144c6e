"""Paths and trees: dotted names on the outside, sorted flat lists on the inside.

A tree of parameters is a `TensorDict` nested at the dots of its paths (`"h.0.attn.weight"` is `tree["h", "0", "attn",
"weight"]`). Inside the library the same tree is a dict from path to tensor in sorted order, because a TensorDict cannot
be traced. Everything else that flows (activations, batches, auxiliary outputs) is a pytree.

This is the only file that uses `torch.utils._pytree` (torch has no public pytree module; tried with 2.13.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, cast

import torch
import torch.utils._pytree as _pytree
from tensordict import TensorDict, TensorDictBase

from autofunc.errors import ModelError

TreeSpec = _pytree.TreeSpec
Nested = Mapping[str, Any]
"""A nested mapping whose leaves are tensors; a `TensorDict` is one."""


def join(*parts: str) -> str:
    """Join non-empty path parts with dots: `join("h.0", "", "weight") == "h.0.weight"`."""
    return ".".join(part for part in parts if part)


def split_path(path: str) -> tuple[str, ...]:
    """Split a dotted path into keys. This is the one place that decides what a dot means."""
    parts = tuple(path.split("."))
    if not all(parts):
        raise ModelError(f"{path!r} is not a path: expected names joined by single dots, such as 'h.0.weight'")
    return parts


def check_prefix_free(paths: Iterable[str]) -> None:
    """Refuse a set of paths in which one is a prefix of another (`h` beside `h.0`).

    Raises:
        ModelError: naming both paths.
    """
    ordered = sorted(split_path(path) for path in paths)
    for shorter, longer in pairwise(ordered):
        if longer[: len(shorter)] == shorter:
            raise ModelError(
                f"{'.'.join(shorter)!r} and {'.'.join(longer)!r} cannot both be names in one tree: names are split at "
                "every dot, so the first would be a leaf and a folder at once. Rename one of them."
            )


def flatten(tree: Nested) -> dict[str, Any]:
    """Flatten a nested mapping into {path: leaf}, sorted by path (as tuples of keys)."""
    found: list[tuple[str, Any]] = []

    def visit(prefix: str, node: Nested) -> None:
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            if not isinstance(value, torch.Tensor) and isinstance(value, (Mapping, TensorDictBase)):
                visit(path, value)
            else:
                found.append((path, value))

    visit("", tree)
    found.sort(key=lambda item: split_path(item[0]))
    return dict(found)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {path: leaf} into plain nested dicts."""
    check_prefix_free(flat)
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = split_path(path)
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return root


def to_tensordict(flat: Mapping[str, torch.Tensor]) -> TensorDict:
    """Turn {path: tensor} into a TensorDict nested at the dots, in sorted order, with an empty batch size."""
    ordered = {path: flat[path] for path in sorted(flat, key=split_path)}
    return TensorDict(nest(ordered), batch_size=[])


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return whether a path matches a shell-style pattern; `*` crosses dots (`lm_head*`, `*.bias`)."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def leaves_and_spec(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Flatten a pytree (tuples, lists, dicts, dataclasses registered with torch) into its leaves and its structure."""
    return _pytree.tree_flatten(tree)


def from_leaves(leaves: Iterable[Any], spec: TreeSpec) -> Any:
    """Inverse of `leaves_and_spec`."""
    return _pytree.tree_unflatten(leaves, spec)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every leaf of a pytree."""
    return _pytree.tree_map(function, tree)


def with_known_classes(tree: Any) -> Any:
    """Return the tree; afterwards dataclasses and other objects in it that hold tensors count as nodes, not leaves.

    An object's children are its attributes, in the order they were set.
    """
    for part in _pytree.tree_leaves(tree):
        if isinstance(part, (type, torch.Tensor)):
            continue
        if is_dataclass(part):
            torch.export.register_dataclass(type(part))
            return with_known_classes(tree)
        if any(isinstance(leaf, torch.Tensor) for leaf in _pytree.tree_leaves(getattr(part, "__dict__", {}))):
            _register_object(type(part))
            return with_known_classes(tree)
    return tree


def _register_object(cls: type) -> None:
    """Register a class of objects with attributes as a pytree node."""

    def flatten(value: Any) -> tuple[list[Any], list[str]]:
        return list(vars(value).values()), list(vars(value))

    def unflatten(children: Iterable[Any], names: list[str]) -> Any:
        made = cast(Any, cls).__new__(cls)
        vars(made).update(zip(names, children, strict=True))
        return made

    _pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=lambda value: (
            [(_pytree.GetAttrKey(name), child) for name, child in vars(value).items()], list(vars(value)),
        ),
    )  # fmt: skip


def leaf_names(tree: Any, root: str) -> list[str]:
    """Return a readable name for every leaf, in leaf order: `x` for a bare tensor, else `x.hidden`, `x.0`, ..."""
    try:
        return [join(root, *(_key_text(key) for key in path)) for path, _ in _pytree.tree_leaves_with_path(tree)]
    except ValueError:  # the class is registered without names for its children
        return [join(root, str(number)) for number in range(len(_pytree.tree_leaves(tree)))]


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
