"""What a model that keeps keys and values is given: the contract between those who build one and `af.generate`.

`model.with_cache(form)` is a model with the same parameters and the same layers, some of which keep state. Its batch has
`input_ids` (rows, tokens), `position_ids` of the same shape, `start`, the column of the first of these tokens as a tensor
without dims, and `attention_mask` (rows, length), which is 0 in columns of padding. It returns logits, of the last token
at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class CacheForm:
    """How large a cache is."""

    rows: int
    length: int  # columns, one for each token of the longest text
    dtype: torch.dtype


WithCache = Callable[[CacheForm], Any]
"""From the form of a cache to an `af.Model` that has one."""
