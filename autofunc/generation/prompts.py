"""Prompts of different lengths as rows of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autofunc.errors import BatchError

Prompts = Sequence[Sequence[int]] | Tensor


def as_lists(prompts: Prompts, vocab_size: int | None) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        prompts: sequences of token ids, or an integer tensor of shape (rows, tokens).
        vocab_size: number of token ids; None if unknown.

    Raises:
        BatchError: for invalid or empty prompts, and token ids out of range.
    """
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [_ids_of(prompt) for prompt in prompts]
    if not rows or not all(isinstance(row, list) for row in rows):
        raise BatchError(
            f"prompts={_brief(prompts)}: expected a list of prompts, each a list of token ids, such as [[1, 5, 3], [2]]"
        )
    for number, row in enumerate(rows):
        if not row:
            raise BatchError(f"prompt {number} has no tokens; give it at least one, such as the begin-of-text token")
        wrong = [token for token in row if not isinstance(token, int) or isinstance(token, bool) or token < 0]
        if wrong:
            raise BatchError(f"prompt {number} has {_brief(wrong[0])} among its tokens; expected integers of at least 0")
        if vocab_size is not None and max(row) >= vocab_size:
            raise BatchError(
                f"prompt {number} has the token {max(row)}, and the model knows those below vocab_size={vocab_size}; it "
                "was tokenised for a different model"
            )
    return rows


def _ids_of(prompt: Any) -> Any:
    if isinstance(prompt, Tensor):
        return prompt.tolist()
    return list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes)) else None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class LeftPadded:
    """Prompts padded on the left to end in the same column, with room for the tokens that follow.

    Args:
        rows: token ids of each row.
        width: number of columns of the prompts.
        length: number of all columns.
        device: of the tensors.
    """

    rows: Sequence[Sequence[int]]
    width: int
    length: int
    device: torch.device

    @property
    def input_ids(self) -> Tensor:
        """int64, shape (rows, width); 0 before a prompt begins."""
        return torch.tensor([[0] * (self.width - len(row)) + list(row) for row in self.rows], device=self.device)

    @property
    def first(self) -> Tensor:
        """The column in which each prompt begins: int64, shape (rows, 1)."""
        return torch.tensor([[self.width - len(row)] for row in self.rows], device=self.device)

    def mask(self) -> Tensor:
        """Return 0 for padding and 1 elsewhere: int64, shape (rows, length)."""
        return (torch.arange(self.length, device=self.device) >= self.first).long()

    def positions(self, start: int, stop: int) -> Tensor:
        """Return the positions of these columns' tokens in their texts: int64, (rows, stop - start); 0 for padding."""
        return (torch.arange(start, stop, device=self.device) - self.first).clamp_min(0)


def rounded_up(number: int, to: int) -> int:
    """Round up to a multiple of `to`."""
    return -(-number // to) * to
