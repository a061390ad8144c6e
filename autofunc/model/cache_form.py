"""The contract between `af.generate` and a model with a KV cache.

`model.with_cache(form)` returns a model with the same parameters and the same layers, some of which keep state. Its batch
has `input_ids` (rows, tokens), `position_ids` of the same shape, `start`, the column of the first of these tokens as a
zero-dim tensor, and `attention_mask` (rows, length), which is 0 in padding columns. It returns logits of at least the last
token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CacheForm:
    """The size and dtype of a cache."""

    rows: int
    length: int  # number of columns, one per token of the longest text
    dtype: torch.dtype


WithCache = Callable[[CacheForm], Any]
"""Returns an `af.Model` with a cache of the given form."""
