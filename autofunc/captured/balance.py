"""The balance loss of a transformers router, over the tokens of all ranks that share its experts.

Modules compute it in their own loss (`load_balancing_loss_func`, one function in nearly all of them): sums over tokens
divided by the number of tokens. While a forward is exported, dividends and divisors pass through a mark, which is the
identity on one process and the mean over these ranks on several; so a rank's loss is that of one process with all tokens.
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
_MEANS = 2  # the divisions it does: the share of tokens that chose an expert, and the expert's mean probability

_library = torch.library.Library("autofunc", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("mean_over_expert_ranks(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("mean_over_expert_ranks", torch.clone, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("autofunc::mean_over_expert_ranks", torch.clone)
MEAN = torch.ops.autofunc.mean_over_expert_ranks.default
"""The mark."""


class _Marking(TorchFunctionMode):
    """Passes the dividend and divisor of every division through the mark."""

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
    """Inside, balance losses of transformers modules are taken over the ranks that share the experts."""
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
        # a function written differently is left as it is: each rank's loss is that of its own tokens
        return made if marking.means == _MEANS else function(*args, **kwargs)

    return marked
