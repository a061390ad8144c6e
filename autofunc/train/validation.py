"""The validation loss of a run."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from autofunc.mesh import data_coordinate
from autofunc.pipe import Pipeline
from autofunc.runtime.plan import Mode
from autofunc.train.progress import Reporter
from autofunc.train.recipe import Recipe
from autofunc.train.step import to_device
from autofunc.train.weighing import together


def validate(
    recipe: Recipe, pipe: Pipeline, params: TensorDict, state: TensorDict, device: torch.device, reporter: Reporter
) -> float | None:
    """The mean loss over the validation dataset, weighted as the loss says; None without one, or without labels in it.

    Args:
        recipe: for its validation loader.
        pipe: of the run.
        params: of this rank.
        state: of this rank.
        device: where batches go.
        reporter: told of every part of a batch.
    """
    if recipe.make_validation_loader is None:
        return None
    place, places = data_coordinate(pipe.mesh)
    loader = recipe.make_validation_loader(place=place, places=places)
    results = []
    for index, part in enumerate(loader, start=1):
        results.append(pipe.run(Mode.LOSS, params, to_device(part.batch, device), None, state))
        reporter.validating(index, len(loader))
    loss, weight = together(results)
    return loss if weight else None
