"""A run that has a configuration: check it, then train in this process or start the workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from autofunc.config import FinetuneConfig
from autofunc.timing import clock
from autofunc.train.device import check_devices
from autofunc.train.fork_server import ForkServer
from autofunc.train.launch import launch
from autofunc.train.memory_budget import check_budget
from autofunc.train.output import default_output_dir, make_output_dir
from autofunc.train.recipe import Recipe, prepare
from autofunc.train.role import was_checked
from autofunc.train.run import run
from autofunc.train.tensor_parallel_check import check_tensor_parallel
from autofunc.train.worker import run_worker


def checked_recipe(config: FinetuneConfig, nproc_per_node: int | None, notes: Sequence[str]) -> Recipe:
    """Build a run, and try it without its processes.

    Args:
        config: what is wanted.
        nproc_per_node: processes to start; the configuration's own number by default.
        notes: what the user should know already.

    Raises:
        AutofuncError: for every mistake in the configuration.
    """
    recipe = prepare(config, nproc_per_node, notes=notes)
    check_tensor_parallel(recipe)
    check_budget(recipe)
    check_devices(config.distributed.device, recipe.axes.num_processes)
    return recipe


def begin(
    recipe: Recipe,
    config: FinetuneConfig,
    notes: Sequence[str],
    output_dir: Path,
    overwrite: bool,
    server: ForkServer | None,
) -> None:
    """Train here where one process is enough, else in processes that are forked.

    Args:
        recipe: of `checked_recipe`.
        config: what it was made of.
        notes: see `checked_recipe`.
        output_dir: where results are written.
        overwrite: whether a run that is there is replaced.
        server: forks the workers; None where one process is enough.
    """
    make_output_dir(output_dir, overwrite)
    if recipe.axes.num_processes == 1:
        run(recipe, config, output_dir)
        return
    assert server is not None
    sys.stdout.write(f"starting {recipe.axes.num_processes} processes\n")
    sys.stdout.flush()
    launch(server, recipe.axes.num_processes, partial(_as_worker, config, list(notes), output_dir, clock.began))


def _as_worker(config: FinetuneConfig, notes: list[str], output_dir: Path, began: float) -> None:
    clock.becomes(int(os.environ["RANK"]), began)
    run_worker(lambda: run_rank(config, notes, output_dir, overwrite=False))


def run_rank(config: FinetuneConfig, notes: Sequence[str], output_dir: Path, *, overwrite: bool) -> None:
    """One rank's part of a run.

    Args:
        config: what is wanted.
        notes: what the user should know already.
        output_dir: where results are written.
        overwrite: whether a run that is there is replaced.
    """
    recipe = prepare(config, int(os.environ["WORLD_SIZE"]), notes=notes, checked=was_checked())
    if not was_checked() and os.environ.get("RANK", "0") == "0":  # the one that writes
        make_output_dir(output_dir, overwrite)
    run(recipe, config, output_dir)


def output_dir_of(config: FinetuneConfig, config_path: str) -> Path:
    """Where a run writes: what its configuration says, or beside others of its file."""
    return Path(config.output_dir).expanduser() if config.output_dir is not None else default_output_dir(config_path)
