"""What is measured beside the loss: functions of outputs and a microbatch that give `(sum, weight)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from autofunc.errors import BatchError
from autofunc.losses import IGNORED, logits_of


def accuracy(outputs: Any, microbatch: Mapping[str, Any], labels: str = "labels") -> tuple[Tensor, Tensor]:
    """How many labels have the largest logit, and how many there are; those of -100 are left out.

    Args:
        outputs: logits (..., classes), or a mapping or object that has them as "logits".
        microbatch: with the labels (...), integers that are aligned with the logits.
        labels: their name in it.

    Raises:
        BatchError: when there are no such labels, or their shape is another.
    """
    logits = logits_of(outputs, "accuracy")
    if labels not in microbatch:
        raise BatchError(f"accuracy: the batch has no {labels!r}; it has {', '.join(microbatch)}")
    wanted = microbatch[labels]
    if wanted.shape != logits.shape[:-1]:
        raise BatchError(
            f"accuracy: {labels!r} has shape {tuple(wanted.shape)}, and logits {tuple(logits.shape)}; expected "
            f"{tuple(logits.shape[:-1])}"
        )
    counts = wanted != IGNORED
    return ((logits.argmax(-1) == wanted) & counts).sum(), counts.sum()
