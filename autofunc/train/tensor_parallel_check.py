"""A check before processes start: a run's layers can be cut over tp ranks, and its experts spread. Uses a fake mesh.

Private part of torch used, tried with 2.13.0: the fake process group of its tests, whose transfers move nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autofunc.data import first_rows
from autofunc.errors import AutofuncError, ConfigError, MeshError
from autofunc.shard.cut_over_tp import cut_over_tp
from autofunc.shard.parameters import Parameters
from autofunc.splitting import Boundaries, infer_boundaries
from autofunc.spreading import AxisPlan
from autofunc.train.axes import Axes
from autofunc.train.recipe import Recipe
from autofunc.train.trial import lengths_of


@dataclass(frozen=True)
class OverRanks:
    """The findings of `check_tensor_parallel`."""

    over: AxisPlan | None = None  # how tp ranks share a captured module; None for other models, and for a single rank
    boundaries: Boundaries | None = None  # values between the first rank's stages; None if they are those of one process


def check_tensor_parallel(recipe: Recipe) -> OverRanks:
    """Infer the boundaries between stages as the first rank would; a no-op for one tp and one ep rank.

    Only for the launcher: torch caches properties of the mesh, which must not mix with those of the real one.

    Raises:
        ConfigError: naming what does not divide, or the stage that cannot be cut or has no experts.
    """
    model = recipe.stages[0].model
    try:
        cut = cut_over_tp(model, recipe.axes.tp, recipe.sharding)
        if recipe.axes.tp == recipe.axes.ep == 1:
            return OverRanks()
        if recipe.sharding.sequence_parallel:
            _check_lengths(recipe)
        with imagined(recipe.axes) as mesh:
            parameters = Parameters(recipe.stages, model, mesh, recipe.sharding)
            microbatch = recipe.microbatch((0, 0))
            found = infer_boundaries(recipe.stages, {}, microbatch, recipe.loss, setting=parameters.setting)
        return OverRanks(cut.over, found)
    except AutofuncError as error:
        raise ConfigError(f"distributed, with {recipe.axes}: {error}") from error


def _check_lengths(recipe: Recipe) -> None:
    for where, dataset in {"dataset": recipe.dataset, **recipe.validation_datasets}.items():
        for length in lengths_of(dataset):
            ids = first_rows(dataset, 1, length=length).get("input_ids")
            if ids is not None and ids.shape[-1] % recipe.axes.tp:
                raise MeshError(
                    f"sequence_parallel cuts sequences into {recipe.axes.tp} equal parts, and those of {where} have "
                    f"{ids.shape[-1]} tokens; use another seq_len"
                )


@contextmanager
def imagined(axes: Axes) -> Iterator[DeviceMesh]:
    """Return a mesh of processes that do not exist, as seen by its first rank. Only for a process without peers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=axes.num_processes)
    try:
        yield axes.mesh("cpu")
    finally:
        dist.destroy_process_group()
