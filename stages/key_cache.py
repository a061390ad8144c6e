"""The KV cache of a block, kept between generation steps; see `autofunc.model.cache_form`.

Shapes: B rows, T tokens of a step, S columns of the cache, K key and value heads, H features per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import autofunc as af
from autofunc.model import CacheForm

Params = Mapping[str, Any]


class KeyCache:
    """The keys and values of one block during a step.

    Args:
        state: "keys" and "values", each (B, K, S, H).
        batch: "start" is the column of the first token, "position_ids" (B, T) are the tokens' positions in their texts,
            "attention_mask" (B, S) is zero in padding columns.
        window: number of tokens a token sees, including itself; None means all before it.
    """

    def __init__(self, state: Params, batch: Params, window: int | None = None) -> None:
        self.state: dict[str, Tensor] = dict(state)
        self._batch, self._window = batch, window

    def extended(self, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write this step's keys and values into their columns, and return all of them: each (B, K, S, H)."""
        columns_T = self._columns(k_BKTH.shape[2])
        for name, new in (("keys", k_BKTH), ("values", v_BKTH)):
            kept = self.state[name]
            self.state[name] = kept.index_copy(2, columns_T, new.to(kept.dtype))
        keys_BKSH, values_BKSH = self.state["keys"], self.state["values"]
        return keys_BKSH.to(k_BKTH.dtype), values_BKSH.to(v_BKTH.dtype)

    def seen(self, tokens: int) -> Tensor:
        """Return which columns this step's tokens see: bool, (B, 1, T, S)."""
        real_BS: Tensor = self._batch["attention_mask"] != 0
        distance_TS = self._columns(tokens)[:, None] - torch.arange(real_BS.shape[1], device=real_BS.device)
        seen_TS = distance_TS >= 0
        if self._window is not None:
            seen_TS = seen_TS & (distance_TS < self._window)
        return (seen_TS & real_BS[:, None, :]).unsqueeze(1)

    @property
    def places_B1T(self) -> Tensor:
        """Positions of this step's tokens in their texts: (B, 1, T)."""
        places: Tensor = self._batch["position_ids"]
        return places.unsqueeze(1)

    def _columns(self, tokens: int) -> Tensor:
        start: Tensor = self._batch["start"]
        return torch.arange(tokens, device=start.device) + start


def caching_layer(
    init: Callable[[af.random.InitKey], Any], apply: Callable[..., Tensor], form: CacheForm, heads: int, features: int,
    window: int | None = None,
) -> af.Layer:  # fmt: skip
    """Build a block whose keys and values are its state.

    Args:
        init: of the block.
        apply: `apply(params, x, batch, cache) -> x`.
        form: of the cache.
        heads: K.
        features: H.
        window: see `KeyCache`.
    """

    def init_state(key: af.random.InitKey) -> dict[str, Tensor]:
        shape = (form.rows, heads, form.length, features)
        return {name: torch.zeros(shape, dtype=form.dtype, device=key.device) for name in ("keys", "values")}

    def advanced(params: Params, x: Tensor, batch: Params, state: Params, training: bool) -> tuple[Tensor, Params]:
        cache = KeyCache(state, batch, window)
        return apply(params, x, batch, cache), cache.state

    return af.Layer(init=init, apply=advanced, init_state=init_state)
