"""Examples as tokens, of which some are learnt: made once, kept in the cache, and read from there."""

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
"""What the length of rows is a multiple of, where it is the longest one's."""


class Example(NamedTuple):
    """The tokens of an example, and which of them are learnt."""

    tokens: Sequence[int]
    learnt: Sequence[bool]


class Examples:
    """Examples one after the other.

    Args:
        tokens: of all of them.
        learnt: which of these.
        starts: of each example, and the end of the last.
    """

    def __init__(self, tokens: np.ndarray, learnt: np.ndarray, starts: np.ndarray) -> None:
        self._tokens, self._learnt, self.starts = tokens, learnt, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.diff(self.starts)

    def count_learnt(self, begin: int, end: int) -> np.ndarray:
        """How many tokens of each example are learnt, from one place in it to before another."""
        before = np.concatenate([[0], np.cumsum(self._learnt)])
        first = np.minimum(self.starts[:-1] + begin, self.starts[1:])
        counts: np.ndarray = before[np.minimum(self.starts[:-1] + end, self.starts[1:])] - before[first]
        return counts

    def at(self, index: int) -> tuple[Tensor, Tensor]:
        """(tokens, which of them are learnt) of an example."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return torch.from_numpy(self._tokens[part].astype(np.int64)), torch.from_numpy(self._learnt[part].astype(bool))


def examples_of(
    what: str, of: str, key: dict[str, Any], tokenizer: Tokenizer, make: Callable[[], Iterable[Example]]
) -> Examples:  # fmt: skip
    """Examples from the cache, or made and put there.

    Args:
        what: makes them, for names of folders.
        of: what they are made of, for the progress.
        key: all that they depend on beside the tokenizer.
        tokenizer: that makes them; one whose content cannot be known is asked each time.
        make: makes them.
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
    """Which tokens are learnt: those that stand for a character of one of the parts of a text, given as (begin, end)."""
    wanted = list(parts)
    return [
        any(begin < end_of_part and end > begin_of_part for begin_of_part, end_of_part in wanted) and begin < end
        for begin, end in zip(spans.begins, spans.ends, strict=True)
    ]


def row_of(tokens: Tensor, learnt: Tensor, length: int, aligned: bool) -> dict[str, Tensor]:
    """A row of `input_ids` and `labels`, filled up with token 0 and -100; what does not fit is cut from its end.

    Args:
        tokens: of the example.
        learnt: which of them.
        length: of the row.
        aligned: whether `labels[t]` is the token after `input_ids[t]`, and not that token itself.
    """
    ahead = 1 if aligned else 0
    taken = min(len(tokens) - ahead, length)
    input_ids = torch.zeros(length, dtype=torch.int64)
    labels = torch.full((length,), IGNORED)
    input_ids[:taken] = tokens[:taken]
    part = slice(ahead, taken + ahead)
    labels[:taken] = tokens[part].masked_fill(~learnt[part], IGNORED)
    return {"input_ids": input_ids, "labels": labels}
