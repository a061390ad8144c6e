"""The balance loss of a router of transformers, over the tokens of all ranks that share its experts.

Its modules compute it in their own loss (`load_balancing_loss_func`, one function in nearly all of them): sums over tokens,
divided by the number of tokens. While a forward is exported, what is divided passes a mark, which is nothing on one process
and the mean over these ranks on several; so the loss of each is that of one process with the tokens of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NAME = "load_balancing_loss_func"
_DIVISIONS = (torch.Tensor.div, torch.Tensor.__truediv__)
_MEANS = 2  # that it takes: the share of tokens that chose an expert, and its mean probability

_library = torch.library.Library("autofunc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("mean_over_expert_ranks(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("mean_over_expert_ranks", torch.clone, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("autofunc::mean_over_expert_ranks", torch.clone)
MEAN = torch.ops.autofunc.mean_over_expert_ranks.default
"""The mark."""


class _Marking(TorchFunctionMode):
    """What is divided, and by what, passes a mark."""

    def __init__(self) -> None:
        super().__init__()
        self.means = 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DIVISIONS:
            self.means += 1
            args = [MEAN(x) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def over_expert_ranks(module: nn.Module) -> Iterator[None]:
    """Inside, balance losses that a module of transformers computes are over the ranks that share its experts."""
    found: list[tuple[ModuleType, Callable[..., Any]]] = []
    for name in {type(part).__module__ for part in module.modules()}:
        space = sys.modules.get(name)
        function = getattr(space, _NAME, None)
        if space is not None and name.startswith("transformers.") and callable(function):
            found.append((space, function))
            setattr(space, _NAME, _marked(function))
    try:
        yield
    finally:
        for space, function in found:
            setattr(space, _NAME, function)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with _Marking() as marking:
            made = function(*args, **kwargs)
        # of another form it stays what it is: the loss of each rank's own tokens
        return made if marking.means == _MEANS else function(*args, **kwargs)

    return marked
