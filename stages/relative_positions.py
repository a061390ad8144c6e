"""Relative positions: a bias on the score of every pair of tokens, depending on their distance.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv
1910.10683, section 2.1; numerics as in Hugging Face transformers, `models/t5/modeling_t5.py` (`compute_bias`).

Shapes: T tokens, N heads.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional


def position_bias(table: Tensor, tokens: int, longest: int, causal: bool) -> Tensor:
    """Return the bias of every pair of positions, (1, N, T, T); with `causal` it hides later tokens.

    Args:
        table: (buckets, N).
        tokens: T.
        longest: distances of at least this share a bucket.
        causal: True in a decoder.
    """
    position = torch.arange(tokens, device=table.device)
    ahead_TT = position - position[:, None]
    bias_TTN = functional.embedding(bucket(ahead_TT, table.shape[0], longest, both_ways=not causal), table)
    bias_1NTT = rearrange(bias_TTN, "q k n -> 1 n q k")
    return bias_1NTT.masked_fill(ahead_TT > 0, torch.finfo(table.dtype).min) if causal else bias_1NTT


def bucket(ahead: Tensor, buckets: int, longest: int, both_ways: bool) -> Tensor:
    """Return the bucket of each distance, int64: one per short distance, then logarithmically wider up to the longest.

    Args:
        ahead: int64; position of the key minus that of the query.
        buckets: number of buckets.
        longest: distances of at least this share a bucket.
        both_ways: True uses half of the buckets for keys ahead; otherwise keys ahead count as distance 0.
    """
    count = buckets // 2 if both_ways else buckets
    distance = ahead.abs() if both_ways else (-ahead).clamp(min=0)
    exact = count // 2
    # clamp the distance first: log(0) is infinite and does not convert to an integer
    growth = torch.log(distance.clamp(min=exact).float() / exact) / math.log(longest / exact)
    far = (exact + (growth * (count - exact)).long()).clamp(max=count - 1)
    near_or_far = torch.where(distance < exact, distance, far)
    return near_or_far + (ahead > 0) * count if both_ways else near_or_far
