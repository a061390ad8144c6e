"""The validation of a run: its loss, and what else is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from tensordict import TensorDict

from autofunc.counted_rows import measured
from autofunc.mesh import data_coordinate
from autofunc.pipe import Pipeline
from autofunc.runtime.plan import Mode
from autofunc.train.progress import Reporter
from autofunc.train.recipe import Recipe
from autofunc.train.step import to_device
from autofunc.train.weighing import together


class Validated(NamedTuple):
    """What a validation gives."""

    loss: float
    metrics: Mapping[str, float]  # NaN where nothing counts

    def named(self) -> dict[str, float]:
        """All of it by name."""
        return {"validation_loss": self.loss, **{f"validation_{name}": value for name, value in self.metrics.items()}}

    def said(self) -> str:
        """All of it as a line."""
        return ", ".join(f"{name.replace('_', ' ', 1)}: {value:.4f}" for name, value in self.named().items())


class Validation:
    """Measures on the validation dataset of a run.

    Args:
        recipe: of the run.
        pipe: of the run.
        device: where batches go.
        reporter: told of every part of a batch.
    """

    def __init__(self, recipe: Recipe, pipe: Pipeline, device: torch.device, reporter: Reporter) -> None:
        self._recipe, self._device, self._reporter = recipe, device, reporter
        self._place, self._places = data_coordinate(pipe.mesh)
        loss = measured(recipe.loss, recipe.microbatch_rows, recipe.metrics) if recipe.metrics else None
        self._pipe = pipe if loss is None else pipe.with_loss(loss)

    def run(self, params: TensorDict, state: TensorDict) -> Validated | None:
        """Measure, weighted as the loss and the metrics say; None without a dataset, or without labels in it.

        Args:
            params: of this rank.
            state: of this rank.
        """
        if self._recipe.make_validation_loader is None:
            return None
        loader = self._recipe.make_validation_loader(place=self._place, places=self._places)
        results = []
        for index, part in enumerate(loader, start=1):
            results.append(self._pipe.run(Mode.LOSS, params, to_device(part.batch, self._device), None, state))
            self._reporter.validating(index, len(loader))
        loss, weight = together(results)
        if not weight:
            return None
        sums = {name: sum(result.aux[name].double() for result in results).tolist() for name in self._recipe.metrics}
        return Validated(loss, {name: total / count if count else math.nan for name, (total, count) in sums.items()})
