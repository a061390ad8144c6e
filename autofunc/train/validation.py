"""A run's validation: its loss and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict

from autofunc.config.validations import display_name, measured_as
from autofunc.counted_rows import measured, weighed
from autofunc.mesh import data_coordinate
from autofunc.pipe import Pipeline
from autofunc.runtime.plan import Mode
from autofunc.train.batches import to_device
from autofunc.train.progress import Reporter
from autofunc.train.recipe import Recipe
from autofunc.train.weighing import together


class Validated(NamedTuple):
    """The results of a validation."""

    by_section: Mapping[str, Mapping[str, float]]  # the loss and metrics of each dataset; a metric without weight is NaN
    loss: float | None  # of the leading dataset; None if none of its rows has a label

    def named(self) -> dict[str, float]:
        """Return all values by name."""
        found = self.by_section.items()
        return {measured_as(section, what): value for section, values in found for what, value in values.items()}

    def text(self) -> str:
        """Return all values as one line."""
        return ", ".join(
            f"{display_name(section)} {what}: {value:.4f}"
            for section, values in self.by_section.items()
            for what, value in values.items()
        )


class Validation:
    """Measures a run on its validation datasets.

    Args:
        recipe: of the run.
        pipe: of the run.
        device: of the batches.
        reporter: told about every part of a batch.
    """

    def __init__(self, recipe: Recipe, pipe: Pipeline, device: torch.device, reporter: Reporter) -> None:
        self._recipe, self._device, self._reporter = recipe, device, reporter
        self._place, self._places = data_coordinate(pipe.mesh)
        rows = recipe.validation_microbatch_rows
        if recipe.metrics:
            self._pipe = pipe.with_loss(measured(recipe.loss, rows, recipe.metrics))
        else:
            self._pipe = pipe if rows == recipe.microbatch_rows else pipe.with_loss(weighed(recipe.loss, rows))

    def run(self, params: TensorDict, state: TensorDict) -> Validated | None:
        """Measure, weighted as the loss and the metrics ask; None without a dataset, or if none has labels.

        Args:
            params: of this rank.
            state: of this rank.
        """
        loaders = self._recipe.validation_loaders
        measured = {section: self._measured(make, params, state) for section, make in loaders.items()}
        found = {section: values for section, values in measured.items() if values}
        leading = found.get(self._recipe.leading_validation or "")
        return Validated(found, leading["loss"] if leading is not None else None) if found else None

    def _measured(self, make_loader: Callable[..., Any], params: TensorDict, state: TensorDict) -> dict[str, float]:
        """Return the loss and the metrics on one dataset; empty if no row has a label."""
        loader = make_loader(place=self._place, places=self._places)
        results = []
        for index, part in enumerate(loader, start=1):
            results.append(self._pipe.run(Mode.LOSS, params, to_device(part.batch, self._device), None, state))
            self._reporter.validating(index, len(loader))
        loss, weight = together(results)
        if not weight:
            return {}
        sums = {name: sum(result.aux[name].double() for result in results).tolist() for name in self._recipe.metrics}
        return {"loss": loss, **{name: total / count if count else math.nan for name, (total, count) in sums.items()}}
