"""A stage is a function of its arguments: tensors it reads from elsewhere would get no gradient."""

from __future__ import annotations

import traceback
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # has no public name; tried with torch 2.13.0

from autofunc.errors import ModelError
from autofunc.fake import user_line

_REAL = (Tensor, nn.Parameter)  # fake tensors, and DTensors of them, have other classes


class NothingTrainedOutside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While functions run on fake tensors, refuses real tensors that require a gradient, since it would be missing.

    Args:
        what: a name for messages.
    """

    def __init__(self, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._what = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in args:  # operators take tensors and lists of tensors
            for leaf in argument if isinstance(argument, (list, tuple)) else (argument,):
                if type(leaf) in _REAL and leaf.requires_grad:
                    raise ModelError(
                        f"{self._what} reads a tensor of shape {tuple(leaf.shape)} that requires a gradient but is not a "
                        f"parameter of the model ({user_line(traceback.extract_stack())}), so its gradient would be "
                        "missing; make it a parameter of a layer, or detach() it"
                    )
        return func(*args, **(kwargs or {}))
