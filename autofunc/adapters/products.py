"""Products with a weight and its low-rank change, y = x W^T + scale (x A^T) B^T, inside an unmodified layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autofunc import tree
from autofunc.adapters.reads import How, Reads, name_of, operands
from autofunc.errors import ModelError

Drop = Callable[[Tensor], Tensor]
"""Dropout of a change's input."""


@dataclass(frozen=True)
class Change:
    """A weight V stands for V + scale * left @ right, which is never materialised."""

    left: Tensor
    right: Tensor
    scale: float
    weight: str  # its path, for error messages
    drop: Drop | None = None

    @property
    def turned(self) -> Change:
        """The change of V^T."""
        return replace(self, left=self.right.t(), right=self.left.t())

    def added_to(self, weight: Tensor) -> Tensor:
        """Return V + scale * left @ right, of V's shape."""
        return weight + (self.left @ self.right) * self.scale


class ChangedProducts(Reads):
    """While active, products with some weights include the weights' changes.

    Neither the change nor its gradient is ever materialised at the weight's size: x is multiplied by one factor after the
    other. Only an operator that uses a weight in any other way gets it with the change added, which costs both.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self._layer, self._needs_grad = layer, torch.is_grad_enabled()
        self._waiting: set[str] = set()  # weights that nothing has multiplied by

    def change(self, weight: Tensor, change: Change) -> None:
        """Register the change of a weight."""
        self._waiting.add(change.weight)
        self.know(weight, change)

    def check_read(self) -> None:
        """Refuse changes without effect.

        Raises:
            ModelError: naming a weight that the layer did not multiply by.
        """
        if self._waiting:
            raise ModelError(
                f"layer {self._layer!r} does not multiply by {min(self._waiting)!r} in any torch operator, so an adapter "
                "of it would have no effect; leave it out of the targets"
            )

    def read(self, func: Callable[..., Any], how: How, args: Sequence[Any], kwargs: Mapping[str, Any], known: Any) -> Any:
        """See `Reads.read`."""
        changes: list[Change] = list(known.values())
        change = changes[0]
        if how is How.LIKE or name_of(func) in ("__len__", "__repr__", "__format__"):
            return func(*args, **kwargs)
        if how is How.TURNED:
            return self.know(func(*args, **kwargs), change.turned)
        if how is How.CONVERTED:
            left, right = (func(part, *args[1:], **kwargs) for part in (change.left, change.right))
            return self.know(func(*args, **kwargs), replace(change, left=left, right=right))
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree.leaves_and_spec(result)[0]):
            return result  # its shape, its dtype
        self._check(func, how, changes)
        self._waiting -= {each.weight for each in changes}
        if how is How.OTHER:
            return func(*_with_changes(args, self._known), **_with_changes(kwargs, self._known))
        given = operands(args, kwargs)
        place = next(number for number, operand in enumerate(given) if id(operand) in known)
        # the scale comes last, as in PEFT: elsewhere it would round differently
        return result + _MADE[how](change, given, place) * (change.scale * kwargs.get("alpha", 1))

    def _check(self, func: Callable[..., Any], how: How, changes: Sequence[Change]) -> None:
        change = changes[0]
        if how is How.LOOKED_UP:
            raise ModelError(
                f"layer {self._layer!r} looks up rows of {change.weight!r}, and adapters fit only weights it multiplies "
                "by; leave it out of the targets, and name it in modules_to_save to train it in full"
            )
        if self._needs_grad and not torch.is_grad_enabled():
            raise ModelError(
                f"layer {self._layer!r} reads {change.weight!r} under no_grad, or inside an autograd.Function, where "
                "its adapter would get no gradient; leave it out of the targets"
            )
        if how is not How.OTHER:
            return
        what = f"layer {self._layer!r} passes {change.weight!r} to {name_of(func)}, which is not a matrix product"
        if any(each.drop is not None for each in changes):
            raise ModelError(f"{what}, so there is no input to drop from; set dropout=0, or leave it out of the targets")
        warnings.warn(
            f"{what}: the weight with its change is materialised for each microbatch, and its gradient takes as much "
            "memory as if the weight were trained",
            stacklevel=2,
        )


def _with_changes(arguments: Any, known: Mapping[int, tuple[Tensor, Change]]) -> Any:
    """Return arguments in which known weights have their changes added."""

    def added(leaf: Any) -> Any:
        return known[id(leaf)][1].added_to(leaf) if id(leaf) in known else leaf

    return tree.map_leaves(added, list(arguments) if isinstance(arguments, Sequence) else dict(arguments))


def _dropped(change: Change, x: Tensor) -> Tensor:
    return x if change.drop is None else change.drop(x)


def _linear(change: Change, given: Sequence[Any], place: int) -> Tensor:
    x = _dropped(change, given[0])
    return functional.linear(functional.linear(x, change.right), change.left)


def _times(change: Change, given: Sequence[Any], place: int) -> Tensor:
    x = _dropped(change, given[place - 1])
    return (x @ change.left) @ change.right


def _before(change: Change, given: Sequence[Any], place: int) -> Tensor:
    x = _dropped(change, given[place + 1])
    return change.left @ (change.right @ x)


def _einsum(change: Change, given: Sequence[Any], place: int) -> Tensor:
    """Split the weight's letters `od` into `or` and `rd`; x meets the factor with the summed letter first."""
    terms, result = given[0].replace(" ", "").split("->")
    letters = terms.split(",")
    of_weight, of_x, x = letters[place - 1], letters[2 - place], _dropped(change, given[3 - place])
    rank = next(letter for letter in ascii_letters if letter not in terms)
    factors = [(f"{rank}{of_weight[1]}", change.right), (f"{of_weight[0]}{rank}", change.left)]
    (near, first), (far, second) = factors[::-1] if of_weight[1] in result else factors
    kept = "".join(letter for letter in dict.fromkeys(of_x.replace("...", "") + near) if letter in far + result)
    middle = f"{'...' if '...' in of_x else ''}{kept}"
    return torch.einsum(f"{middle},{far}->{result}", torch.einsum(f"{of_x},{near}->{middle}", x, first), second)


_MADE: Mapping[How, Callable[[Change, Sequence[Any], int], Tensor]] = {
    How.LINEAR: _linear, How.TIMES: _times, How.BEFORE: _before, How.EINSUM: _einsum,
    How.EINSUM_OVER_ROWS: _einsum,
}  # fmt: skip
