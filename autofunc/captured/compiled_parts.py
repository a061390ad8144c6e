"""`torch.compile` around parts of a module: a capture runs what is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def is_compiled(part: nn.Module) -> bool:
    """Whether a part is what `torch.compile` put around another."""
    return type(part).__module__.startswith("torch.") and type(part).__name__ == "OptimizedModule"


def call_inside(module: nn.Module) -> None:
    """Let compiled parts call what they hold, so that its operators are known to be its own; inside `restored`."""
    for part in module.modules():
        if is_compiled(part):
            vars(part)["forward"] = _calling(part.get_submodule("_orig_mod"))


def _calling(inside: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: inside(*args, **kwargs)
