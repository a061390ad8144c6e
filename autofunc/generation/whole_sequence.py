"""Generation without a cache: every step recomputes whole texts, which works with any causal module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.captured import CapturedModel
from autofunc.errors import ModelError, one_of
from autofunc.losses import logits_of
from autofunc.model import Model
from autofunc.pipe import Pipeline
from autofunc.whole_module import close

_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"
_BESIDE = (_MASK, _POSITIONS, "labels", "token_type_ids")
_FILLERS = (0, 1)  # tokens that fill the columns still unknown


class WholeSteps:
    """Steps of one generation; each recomputes all tokens. Columns still unknown hold fillers on the right.

    Args:
        pipe: of the model.
        params: this process's parameters.
        rows: token ids of each prompt.
        max_new_tokens: the most tokens that follow a prompt.
        state: of layers that keep some.
        device: where this process computes.

    Raises:
        ModelError: if it is unclear which entry of a batch holds the token ids.
    """

    def __init__(
        self, pipe: Pipeline, params: tree.Nested, rows: Sequence[Sequence[int]], max_new_tokens: int,
        state: tree.Nested | None, device: torch.device,
    ) -> None:  # fmt: skip
        self._pipe, self._params, self._state = pipe, params, state
        self._entry, self._takes = _entries(pipe.stages[0].model)
        length = max(map(len, rows)) + max_new_tokens - 1
        filled = [[*row, *[_FILLERS[0]] * (length - len(row))] for row in rows]
        self._ids = torch.tensor(filled, device=device)
        self._lengths, self.num_rows = torch.tensor([len(row) for row in rows], device=device), len(rows)

    def logits(self, tokens: Tensor | None) -> Tensor | None:
        """See `CachedSteps.logits`. All are NaN if the model looks at tokens to the right.

        Raises:
            ModelError: if the model does not return logits of shape (rows, tokens, vocabulary).
        """
        if tokens is None:
            first, second = (self._computed(filler) for filler in _FILLERS)
            if first is None or second is None:
                return None
            return first if close(first, second) else torch.full_like(first, torch.nan)
        columns = torch.arange(self._ids.shape[1], device=self._ids.device)
        self._ids = torch.where(columns == self._lengths.unsqueeze(-1), tokens.unsqueeze(-1), self._ids)
        self._lengths = self._lengths + 1
        return self._computed(_FILLERS[0])

    def _computed(self, filler: int) -> Tensor | None:
        columns = torch.arange(self._ids.shape[1], device=self._ids.device)
        known = columns < self._lengths.unsqueeze(-1)
        entries = {
            self._entry: torch.where(known, self._ids, filler),
            _MASK: known.long(),
            _POSITIONS: columns.expand_as(self._ids).contiguous(),
        }
        batch = {name: value for name, value in entries.items() if name in (self._entry, *self._takes)}
        outputs = self._pipe.forward(self._params, batch, state=self._state)
        if outputs is None:
            return None
        logits = logits_of(outputs, "generate")
        if logits.dim() != 3 or logits.shape[:2] != self._ids.shape:
            raise ModelError(
                f"{self._pipe.stages[0].model.title} returns {tuple(logits.shape)} for {tuple(self._ids.shape)} tokens; "
                "expected logits of shape (rows, tokens, vocabulary)"
            )
        return logits[torch.arange(len(logits), device=logits.device), self._lengths - 1]


def _entries(model: Model) -> tuple[str, Sequence[str]]:
    """Return (the batch entry that holds token ids, the other entries to pass)."""
    base = getattr(model, "base", model)
    if not isinstance(base, CapturedModel):
        return _IDS, ()
    example: Mapping[str, Any] = base.selected(base.example)
    if _IDS in example:
        return _IDS, [name for name in (_MASK, _POSITIONS) if name in example]
    found = [
        name
        for name, value in example.items()
        if name not in _BESIDE and isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
    ]
    if len(found) != 1:
        raise ModelError(
            f"{model.title} takes {', '.join(example)}, and it is unclear which of these are token ids; "
            f"{one_of(_IDS, example)}"
        )
    return found[0], [name for name in (_MASK, _POSITIONS) if name in example]
