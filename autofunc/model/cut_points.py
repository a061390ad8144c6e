"""The places where a model can be cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CutPoints:
    """Names at which a stage may begin; several names may denote one place.

    Args:
        start: name -> its position among all places, in execution order.
        refused: names of parts of the model at which no stage may begin -> the reason.
    """

    start: Mapping[str, int]
    refused: Mapping[str, str] = field(default_factory=dict)
