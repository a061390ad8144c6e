"""The next token of each row: the likeliest, or a sample of the likely ones.

A sample is a function of (seed, step, row): the same in any layout, and whatever the batch's other rows are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autofunc.errors import AutofuncError
from autofunc.random import make_key, multinomial


@dataclass(frozen=True)
class Sampling:
    """The choice of tokens; greedy by default.

    Args:
        temperature: divides the logits; 0 is greedy, and None means 1 if top_k or top_p is given.
        top_k: sample from this many of the likeliest tokens.
        top_p: sample from the likeliest tokens whose probabilities add up to this, at least one token.
        seed: of the samples.

    Raises:
        AutofuncError: for numbers out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise AutofuncError(f"temperature={self.temperature}: expected 0, which takes the likeliest token, or more")
        if self.top_k is not None and self.top_k < 1:
            raise AutofuncError(f"top_k={self.top_k}: expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise AutofuncError(f"top_p={self.top_p}: expected a probability above 0, at most 1")

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0 or (self.temperature is None and self.top_k is None and self.top_p is None)


def next_tokens(logits: Tensor, sampling: Sampling, step: int) -> Tensor:
    """Return the next token of each row, int64 of shape (rows,).

    Args:
        logits: of the next token, shape (rows, vocabulary).
        sampling: how to choose.
        step: number of tokens generated so far.
    """
    if sampling.is_greedy:
        return logits.argmax(-1)
    weights = probabilities(logits, sampling)
    return multinomial(make_key(sampling.seed, step, device=logits.device), weights).squeeze(-1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the weights tokens are sampled with: fp32, shape of the logits; with top_p they do not add up to 1."""
    wide = logits.float() / (1.0 if sampling.temperature is None else sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < wide.shape[-1]:
        least = wide.topk(sampling.top_k).values[..., -1:]
        wide = wide.masked_fill(wide < least, -torch.inf)
    weights = wide.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_weights, order = weights.sort(stable=True, dim=-1, descending=True)
        before = sorted_weights.cumsum(-1) - sorted_weights
        left_out = (before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p)
        weights = weights.masked_fill(left_out, 0.0)
    return weights
