"""The next token of each row: the likeliest, or one drawn from those that are likely.

What is drawn is a function of (seed, step, row): the same in any layout, and for any other rows of the batch.
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
    """How tokens are chosen. With nothing given the likeliest is taken each time.

    Args:
        temperature: divides the logits; 1 where another choice but none is given here, 0 takes the likeliest.
        top_k: draw from so many of the likeliest tokens.
        top_p: draw from the likeliest tokens that together have this probability, at least one.
        seed: of the draws.

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
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or (self.temperature is None and self.top_k is None and self.top_p is None)


def next_tokens(logits: Tensor, sampling: Sampling, step: int) -> Tensor:
    """The next token of each row, int64 of shape (rows,).

    Args:
        logits: of the next token, shape (rows, vocabulary).
        sampling: how to choose.
        step: how many tokens were generated before.
    """
    if sampling.is_greedy:
        return logits.argmax(-1)
    weights = probabilities(logits, sampling)
    return multinomial(make_key(sampling.seed, step, device=logits.device), weights).squeeze(-1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn with: fp32, of the shape of the logits; not all add up to 1."""
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
