"""Rows of examples with a loss mask: cut or padded to a length; rows without anything to train on are dropped."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from autofunc.data.checks import check_length
from autofunc.data.learnt_tokens import ROUND_UP_TO, Examples, row_of
from autofunc.data.tokenizer import Tokenizer
from autofunc.errors import DataError, one_of
from autofunc.shown import shown

PaddingMode = Literal["max_length", "do_not_pad"]
_PADDING_MODES = ("max_length", "do_not_pad")


class InstructionRows(Dataset[dict[str, Tensor]]):
    """Rows of {"input_ids", "labels"}, int64 of shape (tokens,); labels are -100 outside the loss.

    Args:
        examples: all of them.
        tokenizer: that produced their tokens.
        of: their source, for error messages.
        seq_length: see `autofunc.data.ChatDataset`.
        padding: see there.
        truncation: see there.
        aligned_labels: see there.

    Raises:
        DataError: if no row has anything to train on, or one is too long and may not be cut.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        of: str,
        *,
        seq_length: int | None,
        padding: PaddingMode,
        truncation: bool,
        aligned_labels: bool,
    ) -> None:
        name = type(self).__name__
        check_length(name, seq_length)
        if padding not in _PADDING_MODES:
            raise DataError(f"{name}: padding={padding!r}: {one_of(padding, _PADDING_MODES)}")
        self.tokenizer, self.aligned_labels, self.notes, self._of = tokenizer, aligned_labels, list[str](), of
        self._examples, self._pads = examples, padding == "max_length"
        if not len(examples):
            raise DataError(f"{name}: {of} is empty")
        ahead = 1 if aligned_labels else 0
        longest = int(examples.lengths.max()) - ahead
        rounded = max(-(-longest // ROUND_UP_TO), 1) * ROUND_UP_TO if self._pads else longest
        self.seq_len = seq_length if seq_length is not None else rounded
        most = self.seq_len + ahead
        long = int((examples.lengths > most).sum())
        if long and not truncation:
            raise DataError(
                f"{name}: {long:,} of {len(examples):,} rows of {of} have more than seq_length={seq_length} tokens, the "
                f"longest {longest:,}; give a longer seq_length, or truncation: true"
            )
        self._kept = np.flatnonzero(examples.count_learnt(1, most))
        without = len(examples) - len(self._kept)
        if not len(self._kept):
            raise DataError(
                f"{name}: no row of {of} has anything to train on within seq_length={self.seq_len}; the longest has "
                f"{longest:,} tokens"
            )
        if long:
            self.notes.append(
                f"{long:,} of {len(examples):,} rows are longer than {self.seq_len} tokens; their end is cut off"
            )
        if without:
            self.notes.append(
                f"{without:,} of {len(examples):,} rows are dropped: nothing to train on within {self.seq_len} tokens"
            )

    def __repr__(self) -> str:
        length = f"{'' if self._pads else 'up to '}{self.seq_len}"
        return f"{self._of}, {len(self):,} rows of {length} tokens ({shown(self.tokenizer.name)})"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, learnt = self._examples.at(self._kept[index])
        own = min(len(tokens) - (1 if self.aligned_labels else 0), self.seq_len)
        return row_of(tokens, learnt, self.seq_len if self._pads else own, self.aligned_labels)
