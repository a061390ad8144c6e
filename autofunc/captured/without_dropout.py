"""Dropout that drops nothing, so that two runs can be compared value by value, while the module stays in its mode.

Parts that draw random numbers other than by dropout are put in eval mode if that stops them: see `evaluation.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_IDENTITY = {
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout, torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_,
    torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
}  # fmt: skip
_PARTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MULTI_HEAD = inspect.signature(functional.multi_head_attention_forward)
_DROPOUT_OF_ATTENTION = 4  # its position among the arguments of scaled_dot_product_attention
_RRELU = {functional.rrelu, torch.rrelu, torch.rrelu_}
_TRAINING_OF_RRELU = 3
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class WithoutDropout(TorchFunctionMode):
    """Inside, torch's dropout is the identity, including that of attention and recurrent layers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _IDENTITY:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = _with(args, kwargs, _DROPOUT_OF_ATTENTION, "dropout_p", 0.0)
        elif func in _RRELU:
            args = _with(args, kwargs, _TRAINING_OF_RRELU, "training", False)
        elif func is functional.multi_head_attention_forward:
            bound = _MULTI_HEAD.bind(*args, **kwargs)
            bound.arguments["dropout_p"] = 0.0
            args, kwargs = bound.args, bound.kwargs
        elif func in _RECURRENT:  # the probability is the only float; its position depends on the form of the batch
            args = tuple(0.0 if isinstance(argument, float) else argument for argument in args)
        return func(*args, **kwargs)


def _with(args: Any, kwargs: dict[str, Any], position: int, name: str, value: Any) -> Any:
    """Replace an argument that may be passed by position or by name."""
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :])
    kwargs[name] = value
    return args


@contextmanager
def still(module: nn.Module, parts: Iterable[str] = ()) -> Iterator[None]:
    """Inside, dropout drops nothing, and some parts of a module, given by name, are in eval mode.

    This holds for a backward too, whose recomputation a mode would not reach.
    """
    changed = [part for part in map(module.get_submodule, parts) if part.training]
    dropping = [(part, part.p) for part in module.modules() if isinstance(part, _PARTS)]
    try:
        for part in changed:
            part.training = False
        for drop, _ in dropping:
            drop.p = 0.0
        with WithoutDropout():
            yield
    finally:
        for part in changed:
            part.training = True
        for drop, p in dropping:
            drop.p = p
