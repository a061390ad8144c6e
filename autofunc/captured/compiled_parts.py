"""Parts of a module wrapped by `torch.compile`: a capture runs the module inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def is_compiled(part: nn.Module) -> bool:
    """True if a part is a wrapper made by `torch.compile`."""
    return type(part).__module__.startswith("torch.") and type(part).__name__ == "OptimizedModule"


def call_inside(module: nn.Module) -> None:
    """Let compiled parts call the modules they hold, so that operators are attributed to those; inside `restored`."""
    for part in module.modules():
        if is_compiled(part):
            vars(part)["forward"] = _calling(part.get_submodule("_orig_mod"))


def _calling(inside: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: inside(*args, **kwargs)
