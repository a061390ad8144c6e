"""P4: which entries of the batch are cut into microbatches, and which go to every microbatch whole."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from autofunc import tree
from autofunc.checks.subject import Subject
from autofunc.checks.verdict import Verdict
from autofunc.errors import BatchError
from autofunc.row_dims import refuse_ambiguous, rows_in_words


def check_entries(subject: Subject) -> list[Verdict]:
    """Return the findings of P4."""
    try:
        refuse_ambiguous(subject.batch, subject.rows, subject.batch_dims, key_name=subject.key_name)
    except BatchError as error:
        return [Verdict("P4", "fail", str(error))]
    found = []
    for name, value in subject.batch.items():
        if name == subject.key_name:
            continue
        for path, leaf in zip(tree.leaf_names(value, str(name)), tree.leaves_and_spec(value)[0], strict=True):
            found += _entry(subject, str(name), path, leaf)
    if found:
        return found
    words = rows_in_words(subject.batch, subject.batch_dims, key_name=subject.key_name)
    return [Verdict("P4", "pass", f"microbatches are cut: {words}")]


def _entry(subject: Subject, name: str, path: str, leaf: Any) -> list[Verdict]:
    if not isinstance(leaf, Tensor):
        if isinstance(leaf, Hashable):
            return []  # a setting, the same for all rows
        text = f"{path!r} is a {type(leaf).__name__}; expected a tensor (torch.from_numpy) or a plain value"
        return [Verdict("P4", "fail", text)]
    if subject.batch_dims or (leaf.dim() > 0 and leaf.shape[0] == subject.rows):
        return []
    dims = [dim for dim, size in enumerate(leaf.shape) if size == subject.rows]
    advice = f"; if dim {dims[0]} holds the rows, pass batch_dims={{{name!r}: {dims[0]}}}" if dims else ""
    text = f"{path!r} of shape {tuple(leaf.shape)} goes whole to every microbatch: its dim 0 is not {subject.rows}{advice}"
    return [Verdict("P4", "warn", text)]
