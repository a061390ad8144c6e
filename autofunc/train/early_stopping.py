"""Early stopping: end a run when its validation loss stops improving."""

from __future__ import annotations

import math
from typing import NamedTuple

from autofunc.config.schema import EarlyStopping


class Patience(NamedTuple):
    """The best validation loss so far, and the number of validations since without improvement."""

    best: float = math.inf
    since: int = 0

    def after(self, loss: float, config: EarlyStopping | None) -> Patience:
        """Return the state after one more validation."""
        if loss < self.best - (config.min_delta if config is not None else 0.0):
            return Patience(loss)
        return Patience(self.best, self.since + 1)

    def is_over(self, config: EarlyStopping | None) -> bool:
        """Return whether patience has run out."""
        return config is not None and self.since >= config.patience
