"""Examples as tokens with a loss mask: tokenised once, then read from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autofunc.data.array_cache import cached
from autofunc.data.tokenizer import Spans, Tokenizer
from autofunc.losses import IGNORED
from autofunc.progress_bar import counting

ROUND_UP_TO = 8
"""Rows as long as the longest example are rounded up to a multiple of this many tokens."""


class Example(NamedTuple):
    """The tokens of an example, and which of them the loss covers."""

    tokens: Sequence[int]
    learnt: Sequence[bool]


class Examples:
    """Examples, concatenated.

    Args:
        tokens: of all examples, shape (tokens,).
        learnt: which of them the loss covers, bool of the same shape.
        starts: of each example, and the end of the last.
    """

    def __init__(self, tokens: np.ndarray, learnt: np.ndarray, starts: np.ndarray) -> None:
        self._tokens, self._learnt, self.starts = tokens, learnt, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64 of shape (examples,)."""
        return np.diff(self.starts)

    def count_learnt(self, begin: int, end: int) -> np.ndarray:
        """Count the tokens of each example that the loss covers, among its tokens `begin` to `end - 1`."""
        before = np.concatenate([[0], np.cumsum(self._learnt)])
        first = np.minimum(self.starts[:-1] + begin, self.starts[1:])
        counts: np.ndarray = before[np.minimum(self.starts[:-1] + end, self.starts[1:])] - before[first]
        return counts

    def at(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (tokens, which of them the loss covers) of an example: int64 and bool, shape (tokens,)."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return torch.from_numpy(self._tokens[part].astype(np.int64)), torch.from_numpy(self._learnt[part].astype(bool))


def examples_of(
    what: str, of: str, key: dict[str, Any], tokenizer: Tokenizer, make: Callable[[], Iterable[Example]]
) -> Examples:  # fmt: skip
    """Read examples from the cache, or build and store them.

    Args:
        what: the kind of dataset, for folder names.
        of: the source of the examples, for the progress bar.
        key: everything they depend on besides the tokenizer.
        tokenizer: that tokenises them; without an `identity` the cache is bypassed.
        make: builds them.
    """

    def arrays() -> dict[str, np.ndarray]:
        tokens, learnt, starts = [np.empty(0, np.int32)], [np.empty(0, bool)], [0]
        with counting(f"tokenising {of}", "rows") as advance:
            for example in make():
                tokens.append(np.asarray(example.tokens, dtype=np.int32))
                learnt.append(np.asarray(example.learnt, dtype=bool))
                starts.append(starts[-1] + len(example.tokens))
                advance(1)
        return {
            "tokens": np.concatenate(tokens), "learnt": np.concatenate(learnt), "starts": np.asarray(starts, dtype=np.int64)
        }  # fmt: skip

    identity = tokenizer.identity
    found = arrays() if identity is None else cached(what, {**key, "tokenizer": identity}, arrays)
    return Examples(found["tokens"], found["learnt"], found["starts"])


def learnt_in(spans: Spans, parts: Iterable[tuple[int, int]]) -> list[bool]:
    """Return which tokens the loss covers: those with a character inside one of the (begin, end) parts of a text."""
    wanted = list(parts)
    return [
        any(begin < end_of_part and end > begin_of_part for begin_of_part, end_of_part in wanted) and begin < end
        for begin, end in zip(spans.begins, spans.ends, strict=True)
    ]


def row_of(tokens: Tensor, learnt: Tensor, length: int, aligned: bool) -> dict[str, Tensor]:
    """Return a row of `input_ids` and `labels`, int64 of shape (length,), padded with 0 and -100 or cut at the end.

    Args:
        tokens: of the example.
        learnt: which of them the loss covers.
        length: of the row.
        aligned: True makes `labels[t]` the token after `input_ids[t]`, False that token itself.
    """
    ahead = 1 if aligned else 0
    taken = min(len(tokens) - ahead, length)
    input_ids = torch.zeros(length, dtype=torch.int64)
    labels = torch.full((length,), IGNORED)
    input_ids[:taken] = tokens[:taken]
    part = slice(ahead, taken + ahead)
    labels[:taken] = tokens[part].masked_fill(~learnt[part], IGNORED)
    return {"input_ids": input_ids, "labels": labels}
