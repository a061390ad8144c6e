"""torch.optim behind a pair of functions: `init` and `update`, with the state as an argument and a return value."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc import tree
from autofunc.carried import Carrier, is_plain
from autofunc.errors import ModelError, one_of

_OUTSIDE = "(outside)"  # of a state: what an optimizer keeps in its groups and attributes
_NOT_DATA = "which cannot be handed from one update to the next: keep tensors, numbers, text, and lists and dicts of them"


class Optimizer:
    """An optimizer as two functions; made by `af.optimizer`."""

    def __init__(self, factory: Callable[..., torch.optim.Optimizer], options: dict[str, Any]) -> None:
        self._factory = factory
        self._options = options

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"optimizer({getattr(self._factory, '__name__', self._factory)}, {options})"

    def init(self, params: tree.Nested) -> TensorDict:
        """The state before the first update: empty, since torch's optimizers fill theirs at the first update.

        Raises:
            ModelError: when the options do not fit the optimizer.
        """
        self._make(list(tree.flatten(params).values())[:1])
        return TensorDict({}, batch_size=[])

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, grads: tree.Nested, state: TensorDict, params: tree.Nested, lr: float | None = None
    ) -> tuple[TensorDict, TensorDict]:
        """One step.

        `grads`, `state` and `params` are donated: the results reuse their memory, so do not use them again.

        Args:
            grads: a tree over the trainable paths of `params`.
            state: what `init` or the last `update` returned: one tree per slot of the optimizer, such as
                `state["exp_avg", "h", "0", "attn", "weight"]`, and what optimizers of others keep in their groups, on
                themselves or in optimizers inside them.
            params: a tree; paths without a gradient are returned unchanged.
            lr: learning rate of this step, instead of the one given at first.

        Returns:
            The new (params, state).

        Raises:
            ModelError: when the optimizer changes something that is no data, or does not take such gradients.
        """
        weights, gradients, slots = tree.flatten(params), tree.flatten(grads), tree.flatten(state)
        unknown = [path for path in gradients if path not in weights]
        if unknown:
            raise ModelError(f"a gradient for {unknown[0]!r}, which is no parameter; {one_of(unknown[0], weights)}")
        leaves = {path: torch.nn.Parameter(weights[path]) for path in gradients}
        for path, leaf in leaves.items():
            leaf.grad = gradients[path]
        optimizer = self._make(list(leaves.values()))
        outside = _Outside(optimizer, leaves)
        outside.load({key: value for key, value in slots.items() if key.startswith(_OUTSIDE)})
        _load_slots(optimizer, leaves, slots)
        before = _set_lr(optimizer, lr) if lr is not None else []
        optimizer.step()
        for group, own in before:
            if group["lr"] == lr:  # which was of this step alone
                group["lr"] = own
        updated = {path: leaf.detach() for path, leaf in leaves.items()}
        untouched = {key: value for key, value in slots.items() if not key.startswith(_OUTSIDE)}
        slots_after = untouched | _slots_of(optimizer, leaves) | outside.kept()
        return _rebuilt(params, weights, weights | updated), _rebuilt(state, slots, slots_after)

    @staticmethod
    def is_outside(slot: str) -> bool:
        """Whether a path in a state is of what an optimizer keeps beside its parameters: in its groups, on itself."""
        return slot.startswith(_OUTSIDE)

    def _make(self, leaves: list[Tensor]) -> torch.optim.Optimizer:
        try:
            made = self._factory(leaves or [torch.zeros(())], **copy.deepcopy(self._options))  # it may write to them
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self!r} cannot be made: {error}") from error
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ModelError(
                f"{self!r} runs the loss again in each step (step(closure)), and gradients are given here; use one whose "
                "step takes none, such as torch.optim.AdamW"
            )
        return made


def path_of_slot(slot: str, paths: Container[str]) -> str:
    """The parameter to which a path in a state belongs: `h.0.weight` of `exp_avg.h.0.weight`; "" where none of these is."""
    token, _, path = slot.partition(".")
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return "" if token.startswith(_OUTSIDE) else path


def _load_slots(optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> None:
    """Give an optimizer that was made anew the slots of its parameters."""
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in slots.items():
        token, _, rest = key.partition(".")
        path = path_of_slot(key, leaves)
        if path:
            inner = rest.removeprefix(path)
            if " (" not in token:
                optimizer.state[leaves[path]][token] = value
            else:
                parts.setdefault((path, token.partition(" (")[0]), {})[token + inner] = value
    for (path, slot), flat in parts.items():
        optimizer.state[leaves[path]][slot] = Carrier({}).together(slot, flat, None)


def _slots_of(optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} as {slot!r} of a parameter, {_NOT_DATA}"
                    )
                for key, part in flat.items():
                    token, _, inner = key.partition(".")
                    found[tree.join(token, path, inner)] = part
    return found


class _Outside:
    """What an optimizer that was made anew keeps in its groups, on itself and in optimizers inside it.

    Tensors are part of the state, and of plain values those that are no longer what they were when it was made. The
    optimizers of torch keep nothing there.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, leaves: Mapping[str, Tensor]) -> None:
        self._optimizer, self._is_torchs = optimizer, type(optimizer).__module__.startswith("torch.optim")
        self._carrier, self._leaves = Carrier(leaves, self._is_no_state), {path.replace(".", "~") for path in leaves}
        self._loaded: dict[str, Tensor] = {}
        self._fresh, self._fixed = self._apart()

    def _is_no_state(self, value: Any, name: str) -> bool:
        if not isinstance(value, torch.optim.Optimizer):
            return False
        return name in _of_every_optimizer() or (name == "state" and value is self._optimizer)

    def _apart(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return ({}, {}) if self._is_torchs else self._carrier.apart(_OUTSIDE, self._optimizer)

    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Give it what `kept` returned after the step before."""
        self._loaded = dict(kept)
        if kept:
            self._carrier.together(_OUTSIDE, kept, self._optimizer)

    def kept(self) -> dict[str, Tensor]:
        """All of it after a step.

        Raises:
            ModelError: when something changed that is no data; it would be lost.
        """
        after, fixed = self._apart()
        for key, part in fixed.items():
            is_new_data = key not in self._fixed and not isinstance(part, int)
            if is_new_data or self._fixed.get(key, part) != part:
                name = key.removeprefix(f"{_OUTSIDE} (object).")
                raise ModelError(f"{type(self._optimizer).__name__} changes {name} in a step, {_NOT_DATA}")
        others = {key: value for key, value in self._loaded.items() if self._is_of_others(key)}
        return others | {key: value for key, value in after.items() if self._counts(key, value)}

    def _counts(self, key: str, value: Tensor) -> bool:
        fresh = self._fresh.get(key)
        return not is_plain(key) or key in self._loaded or fresh is None or not torch.equal(fresh, value)

    def _is_of_others(self, key: str) -> bool:
        """Whether it belongs to a parameter without a gradient in this step."""
        return any(part[0] == "@" and part[1:].partition(" (")[0] not in self._leaves for part in key.split("."))


@cache
def _of_every_optimizer() -> frozenset[str]:
    """Attributes that every optimizer has, and that are no state."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)], lr=0.0))).difference(("state", "param_groups"))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> list[tuple[dict[str, Any], Any]]:
    """Set the learning rate of all groups; returns these, and what they had.

    Raises:
        ModelError: when an optimizer inside has a learning rate of its own.
    """
    own = [(group, group.get("lr")) for group in optimizer.param_groups]
    known = {id(group) for group, _ in own}
    for inner in _optimizers_in(list(vars(optimizer).values())):
        for group in inner.param_groups:
            if id(group) in known:
                continue
            if all(group.get("lr") != each for _, each in own):
                raise ModelError(
                    f"update(lr={lr}) on {type(optimizer).__name__}, in which {type(inner).__name__} has "
                    f"lr={group.get('lr')} of its own: one number cannot be both; leave lr out"
                )
            own.append((group, group["lr"]))
    for group, _ in own:
        group["lr"] = lr
    return own


def _optimizers_in(values: Iterable[Any]) -> Iterator[torch.optim.Optimizer]:
    for value in values:
        if isinstance(value, torch.optim.Optimizer):
            yield value
        elif type(value) in (list, tuple, dict):
            yield from _optimizers_in(value.values() if isinstance(value, dict) else value)


def _rebuilt(given: tree.Nested, before: dict[str, Tensor], after: dict[str, Tensor]) -> TensorDict:
    """The donated tree itself when all its tensors were changed in place, as optimizers do; else a new one."""
    in_place = before.keys() == after.keys() and all(_place(before[path]) == _place(leaf) for path, leaf in after.items())
    if in_place and isinstance(given, TensorDict):
        return given
    return tree.to_tensordict(after)


def _place(leaf: Tensor) -> int:
    """Where a tensor's memory lies; a DTensor has none but that of its local tensor."""
    return (leaf.to_local() if hasattr(leaf, "to_local") else leaf).data_ptr()


def optimizer(factory: Callable[..., torch.optim.Optimizer], **options: Any) -> Optimizer:
    """Turn a `torch.optim` class into an (init, update) pair.

    Args:
        factory: called as `factory(list_of_parameters, **options)`, such as `torch.optim.AdamW`.
        options: its options, such as `lr=3e-4`.

    Returns:
        An object with two functions:

        - `init(params)`: the state before the first update
        - `update(grads, state, params, lr=None)`: the new (params, state); `lr` is the learning rate of this update, for
          schedules. The memory of what is given is used again.

        All that the optimizer keeps is in the state, also what a class of your own has in its groups or attributes.

    Example:
        opt = af.optimizer(torch.optim.AdamW, lr=3e-4)
        state = opt.init(params)
        params, state = opt.update(grads, state, params)
        params, state = opt.update(grads, state, params, lr=3e-4 * min(1, step / 100))
    """
    return Optimizer(factory, options)
