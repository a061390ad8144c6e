"""Replacement of some of torch's functions while a forward runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class Replacing(TorchFunctionMode):
    """Inside, functions of torch are replaced. One mode does it all, since torch records each mode's frames per operator.

    Args:
        functions: by function called, the one to call instead with the same arguments.
    """

    def __init__(self, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._functions.get(func, func)(*args, **(kwargs or {}))
