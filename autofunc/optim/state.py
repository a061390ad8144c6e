"""What an optimizer that is made anew for each update keeps, as a flat dict of tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.carried import Carrier, is_plain
from autofunc.errors import ModelError

OUTSIDE = "(outside"  # how keys begin of what an optimizer keeps in its groups and attributes
NOT_DATA = "which cannot be handed from one update to the next: keep tensors, numbers, text, and lists and dicts of them"


def load_slots(optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """Give an optimizer that was made anew the slots of its parameters."""
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
    """Which of some parameters a slot is of; None for those of others, and what is of none."""
    token, _, path = key.partition(".")
    while path and path not in leaves:
        path = path.rpartition(".")[0]
    return path if path and not token.startswith(OUTSIDE) else None


def slots_of(optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an optimizer keeps of each parameter: `exp_avg.h.0.weight`; of a number `count (int).h.0.weight`."""
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
    """What an optimizer that was made anew keeps in its groups, on itself and in optimizers inside it.

    Tensors are part of the state, and of plain values those that are no longer what they were when it was made. The
    optimizers of torch keep nothing there. Of several optimizers each has a number.
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
        """Give it what `kept` returned after the step before, of all slots."""
        self._loaded = {key: value for key, value in slots.items() if key.startswith(f"{self._root} ")}
        if self._loaded:
            self._carrier.together(self._root, self._loaded, self._optimizer)

    def kept(self) -> dict[str, Tensor]:
        """All of it after a step.

        Raises:
            ModelError: when something changed that is no data; it would be lost.
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
        """Whether it belongs to a parameter without a gradient in this step."""
        return any(part[0] == "@" and part[1:].partition(" (")[0] not in self._leaves for part in key.split("."))


def is_torchs(kind: Any) -> bool:
    """Whether it is an optimizer that comes with torch."""
    return str(getattr(kind, "__module__", "")).startswith("torch.optim")


@cache
def _of_every_optimizer() -> frozenset[str]:
    """Attributes that every optimizer has, and that are no state."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=0.0))).difference(("state", "param_groups"))
