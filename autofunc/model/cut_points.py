"""Where a model can be cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CutPoints:
    """Names at which a stage may begin; several may be names of one place.

    Args:
        start: name -> its position among all places, in the order in which they run.
        refused: names of parts of the model at which none may begin -> why.
    """

    start: Mapping[str, int]
    refused: Mapping[str, str] = field(default_factory=dict)
