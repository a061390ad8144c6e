"""Metrics: functions of outputs and a microbatch that return `(sum, weight)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autofunc.errors import BatchError
from autofunc.losses import IGNORED, logits_of


def accuracy(outputs: Any, microbatch: Mapping[str, Any], labels: str = "labels") -> tuple[Tensor, Tensor]:
    """Return the number of labels with the largest logit, and the number of labels other than -100.

    Args:
        outputs: logits (..., classes), or a mapping or object with "logits".
        microbatch: has the labels (...), integers aligned with the logits.
        labels: their entry.

    Raises:
        BatchError: if the labels are missing or do not have the logits' shape.
    """
    logits = logits_of(outputs, "accuracy")
    if labels not in microbatch:
        raise BatchError(f"accuracy: the batch has no {labels!r}; it has {', '.join(microbatch)}")
    wanted = microbatch[labels]
    if wanted.shape != logits.shape[:-1]:
        raise BatchError(
            f"accuracy: {labels!r} has shape {tuple(wanted.shape)}, but the logits {tuple(logits.shape)}; expected "
            f"{tuple(logits.shape[:-1])}"
        )
    counts = wanted != IGNORED
    return ((logits.argmax(-1) == wanted) & counts).sum(), counts.sum()
