"""`module.to(dtype)` inside a forward: it does nothing if the module has that dtype, and otherwise is refused."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.errors import ModelError
from autofunc.fake import user_line


@contextmanager
def without_conversions(what: str) -> Iterator[None]:
    """Inside, conversions that change nothing leave parameters alone; torch would replace them by equal ones.

    Raises:
        ModelError: for a conversion that changes a parameter or buffer, naming the user's line.
    """
    original = nn.Module._apply

    def apply(part: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for leaf in [*part.parameters(recurse), *part.buffers(recurse)]:
            with torch.no_grad():
                made = convert(leaf)
            if (made.dtype, made.shape, _memory(made)) != (leaf.dtype, leaf.shape, _memory(leaf)):
                line = user_line(traceback.extract_stack())
                raise ModelError(
                    f"{what} converts {type(part).__name__} inside its forward ({line}), which would overwrite its "
                    f"{str(leaf.dtype).removeprefix('torch.')} parameters; convert the module beforehand, or convert the "
                    "values it computes with"
                )
        return part

    setattr(nn.Module, "_apply", apply)  # noqa: B010  # a method of all modules
    try:
        yield
    finally:
        setattr(nn.Module, "_apply", original)  # noqa: B010


def _memory(leaf: Tensor) -> Any:
    return leaf.untyped_storage()._cdata
