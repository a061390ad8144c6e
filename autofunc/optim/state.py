"""The state of an optimizer that is rebuilt for each update, as a flat dict of tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.carried import Carrier, is_plain
from autofunc.errors import ModelError

OUTSIDE = "(outside"  # prefix of the keys for state in an optimizer's groups and attributes
NOT_DATA = "which cannot be carried from one update to the next: keep tensors, numbers, text, and lists and dicts of them"


def load_slots(optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """Load the slots of its parameters into a freshly built optimizer."""
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in slots.items():
        path = path_of_slot(key, leaves)
        if path is not None:
            token, _, rest = key.partition(".")
            inner = rest.removeprefix(path)
            if " (" not in token:
                optimizer.state[leaves[path]][token] = value
            else:
                parts.setdefault((path, token.partition(" (")[0]), {})[token + inner] = value
    for (path, slot), flat in parts.items():
        optimizer.state[leaves[path]][slot] = Carrier({}).together(slot, flat, None)


def path_of_slot(key: str, leaves: Mapping[str, Tensor]) -> str | None:
    """Return the path in `leaves` that a slot belongs to; None if it belongs to another parameter or to none."""
    token, _, path = key.partition(".")
    while path and path not in leaves:
        path = path.rpartition(".")[0]
    return path if path and not token.startswith(OUTSIDE) else None


def slots_of(optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an optimizer's slots of each parameter: `exp_avg.h.0.weight`; a number becomes `count (int).h.0.weight`.

    Raises:
        ModelError: if a slot holds anything that isn't data.
    """
    found: dict[str, Tensor] = {}
    for path, leaf in leaves.items():
        for slot, value in optimizer.state[leaf].items() if leaf in optimizer.state else ():
            if isinstance(value, Tensor):
                found[tree.join(slot, path)] = value
            elif value is not None:
                flat, fixed = Carrier({}).apart(slot, value)
                if fixed:
                    raise ModelError(
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} as {slot!r} of a parameter, {NOT_DATA}"
                    )
                for key, part in flat.items():
                    token, _, inner = key.partition(".")
                    found[tree.join(token, path, inner)] = part
    return found


class Outside:
    """The state a freshly built optimizer keeps in its groups, its attributes and inner optimizers.

    It consists of tensors, and of plain values that differ from those of a fresh optimizer. torch's own optimizers keep
    none. Each of several optimizers has a number.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor], number: int = 0) -> None:
        self._optimizer, self._is_torchs = optimizer, is_torchs(type(optimizer))
        self._root = f"{OUTSIDE} {number})" if number else f"{OUTSIDE})"
        self._carrier, self._leaves = Carrier(leaves, self._is_no_state), {path.replace(".", "~") for path in leaves}
        self._loaded: dict[str, Tensor] = {}
        self._fresh, self._fixed = self._apart()

    def _is_no_state(self, value: Any, name: str) -> bool:
        if not isinstance(value, torch.optim.Optimizer):
            return False
        return name in _of_every_optimizer() or (name == "state" and value is self._optimizer)

    def _apart(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return ({}, {}) if self._is_torchs else self._carrier.apart(self._root, self._optimizer)

    def load(self, slots: Mapping[str, Tensor]) -> None:
        """Restore what `kept` returned after the previous step; `slots` may hold other entries."""
        self._loaded = {key: value for key, value in slots.items() if key.startswith(f"{self._root} ")}
        if self._loaded:
            self._carrier.together(self._root, self._loaded, self._optimizer)

    def kept(self) -> dict[str, Tensor]:
        """Return all of it after a step.

        Raises:
            ModelError: if the step changed anything that isn't data, which would be lost.
        """
        after, fixed = self._apart()
        for key, part in fixed.items():
            is_new_data = key not in self._fixed and not isinstance(part, int)
            if is_new_data or self._fixed.get(key, part) != part:
                name = key.removeprefix(f"{self._root} (object).")
                raise ModelError(f"{type(self._optimizer).__name__} changes {name} in a step, {NOT_DATA}")
        others = {key: value for key, value in self._loaded.items() if self._is_of_others(key)}
        return others | {key: value for key, value in after.items() if self._counts(key, value)}

    def _counts(self, key: str, value: Tensor) -> bool:
        fresh = self._fresh.get(key)
        return not is_plain(key) or key in self._loaded or fresh is None or not torch.equal(fresh, value)

    def _is_of_others(self, key: str) -> bool:
        """Return whether a key belongs to a parameter without a gradient in this step."""
        return any(part[0] == "@" and part[1:].partition(" (")[0] not in self._leaves for part in key.split("."))


def is_torchs(kind: Any) -> bool:
    """Return whether an optimizer class comes with torch."""
    return str(getattr(kind, "__module__", "")).startswith("torch.optim")


@cache
def _of_every_optimizer() -> frozenset[str]:
    """Return the attributes that every optimizer has and that are not state."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=0.0))).difference(("state", "param_groups"))
