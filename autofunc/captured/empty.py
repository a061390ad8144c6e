"""Modules built without memory for their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def empty_weights(seed: int = 0) -> Iterator[None]:
    """Inside, `torch.empty` without a device, which modules call for their weights, gives tensors on the meta device.

    Other tensors are real: tables computed once and kept as buffers keep their values, which `torch.device("meta")` would
    lose. Random ones depend on the seed alone, so all processes get the same.

    Args:
        seed: of the global generator inside; its state is restored afterwards.

    Example:
        with af.empty_weights():
            module = LlamaForCausalLM(config)  # 8 billion parameters, no memory
        model = af.from_module(module, {"input_ids": ids})
    """
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        torch.manual_seed(seed)
        yield
