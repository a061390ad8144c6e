"""A transformers decoder with a KV cache: keys and values are buffers that its forward writes, so they become state."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.automodel.in_transformers import is_model
from autofunc.captured import INSIDE
from autofunc.errors import in_brief
from autofunc.model import CacheForm

_TAKES = ("input_ids", "attention_mask", "past_key_values")


def why_no_cache(module: nn.Module) -> str | None:
    """Return why a module cannot run with a fixed-size cache; None if it can."""
    name = type(module).__name__
    if not is_model(module):
        return f"{name} is not a transformers model"
    model: Any = module
    lacking = [each for each in _TAKES if each not in inspect.signature(module.forward).parameters]
    if lacking:
        return f"{name}.forward does not take {lacking[0]}"
    if not model.can_generate():
        return f"{name} does not support generation"
    if not model._can_compile_fullgraph:
        return f"transformers has no fixed-size cache for {name}"
    try:
        _shapes(model)
    except (AttributeError, TypeError, ValueError) as error:
        return f"the key shapes of {name} are unknown ({in_brief(error)})"
    return None


class DecoderWithCache(nn.Module):
    """A causal language model together with buffers for its keys and values.

    Args:
        module: of transformers, for which `why_no_cache` returns None; not modified.
        form: of the cache.
        device: of the module.
    """

    def __init__(self, module: nn.Module, form: CacheForm, device: torch.device) -> None:
        super().__init__()
        self.add_module(INSIDE, module)
        parameters = inspect.signature(module.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in parameters}
        shapes = _shapes(module)
        self._layers = len(shapes)
        # only the shapes of these buffers matter; on the CPU they need no memory
        where = torch.device("meta") if device.type == "cpu" else device
        for number, (heads, features) in enumerate(shapes):
            for name in ("keys", "values"):
                shape = (form.rows, heads, form.length, features)
                self.register_buffer(
                    f"{name}_{number}", torch.zeros(shape, dtype=form.dtype, device=where), persistent=False
                )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, start: Tensor) -> Tensor:
        """Return the logits of the last token, (rows, 1, vocabulary); see `model.cache_form` for the arguments."""
        from transformers import Cache

        layers = [
            _layer(self.get_buffer(f"keys_{number}"), self.get_buffer(f"values_{number}"), start)
            for number in range(self._layers)
        ]
        more: dict[str, Any] = {"position_ids": position_ids, "logits_to_keep": 1}
        outputs = self.get_submodule(INSIDE)(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=Cache(layers=layers), use_cache=True,
            **{name: value for name, value in more.items() if name in self._takes},
        )  # fmt: skip
        logits: Tensor = outputs.logits
        return logits[:, -1:]


def _shapes(module: Any) -> list[tuple[int, int]]:
    """Return (heads, features per head) of each layer's keys."""
    from transformers.configuration_utils import get_head_shapes

    config = module.config.get_text_config(decoder=True)
    heads, features = (
        [each] * config.num_hidden_layers if isinstance(each, int) else list(each) for each in get_head_shapes(config)
    )
    return list(zip(heads, features, strict=True))


def _layer(keys: Tensor, values: Tensor, start: Tensor) -> Any:
    """Build a layer of transformers' cache on buffers. All layers have one length; masks implement sliding windows."""
    from transformers.cache_utils import StaticLayer

    class Kept(StaticLayer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(keys.shape[2])
            self.is_initialized = True
            self.keys, self.values, self.cumulative_length = keys, values, start
            self.dtype, self.device = keys.dtype, keys.device
            self.batch_size, self.num_heads = keys.shape[:2]

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            columns = torch.arange(key_states.shape[2], device=keys.device) + start
            # write the whole buffer, not a slice: values read before stay valid
            after = [
                kept.index_copy(2, columns, new.to(kept.dtype))
                for kept, new in ((keys, key_states), (values, value_states))
            ]
            keys.copy_(after[0])
            values.copy_(after[1])
            return after[0].to(key_states.dtype), after[1].to(value_states.dtype)

    return Kept()
