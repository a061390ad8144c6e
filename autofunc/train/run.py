"""One process of a training run: sets up its device and mesh, trains, and writes the results on the first rank."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from autofunc.config import FinetuneConfig
from autofunc.config.schema import Distributed
from autofunc.errors import MeshError
from autofunc.explain import explain
from autofunc.schedule import write_file
from autofunc.shown import literal
from autofunc.splitting import parameter_count
from autofunc.timing import clock
from autofunc.train.autoschedule import find_schedule
from autofunc.train.datasets import title
from autofunc.train.device import take_device
from autofunc.train.loop import train
from autofunc.train.metrics import MetricsFile, draw_loss_curve
from autofunc.train.output import METRICS, PICTURE, SCHEDULE, WEIGHTS
from autofunc.train.progress import ProgressReporter, Silent
from autofunc.train.recipe import Recipe
from autofunc.train.threads import threads
from autofunc.train.watched import watched
from autofunc.train.weights import save_safely


def run(recipe: Recipe, config: FinetuneConfig, output_dir: Path) -> None:
    """Train in this process: alone, or as one of the ranks that torchrun or `train.launch` started.

    Raises:
        MeshError: when the number of processes is not what the configuration needs.
    """
    device = take_device(config.distributed.device)
    mesh = _mesh(recipe, device, config.distributed.timeout_minutes)
    clock.done("joining the process group")
    with threads(config.distributed.threads_per_rank):
        if mesh is None or dist.get_rank() == 0:
            _lead(recipe, mesh, device, output_dir, config.distributed)
        else:
            _follow(recipe, mesh, device, config.distributed)
    if mesh is not None:  # not after an error: that must be recorded before the others see the connection close
        dist.destroy_process_group()


def _follow(recipe: Recipe, mesh: DeviceMesh, device: torch.device, config: Distributed) -> None:
    """Any other rank's run."""
    if recipe.searches:
        recipe = replace(recipe, schedule=find_schedule(recipe, mesh, device, None).schedule)
    with watched(config):
        result = train(recipe, mesh, device, Silent(), None)
    for each in (result.params, result.state):
        result.pipe.gather(each)


def _lead(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, output_dir: Path, config: Distributed
) -> None:  # fmt: skip
    """The first rank's run: the others' and everything that is shown or written."""
    console = Console(file=sys.stdout)

    def show(text: str) -> None:
        console.print(literal(text))

    for note in recipe.notes:
        show(f"note: {note}")
    show(f"model: {parameter_count(recipe.model):,} parameters on {device.type}")
    if mesh is not None:
        show(f"mesh: {recipe.axes}, {recipe.axes.num_processes} processes")
    show(f"data: {title(recipe.dataset)}")
    if recipe.validation_dataset is not None:
        show(f"validation: {title(recipe.validation_dataset)}")
    if recipe.searches and mesh is not None:
        found = find_schedule(recipe, mesh, device, console)
        recipe = replace(recipe, schedule=found.schedule)
        for line in found.report():
            show(line)
        write_file(found.schedule, output_dir / SCHEDULE)
        show(f"written to {output_dir / 'schedule.csv'}, which distributed.schedule takes to use it again")
    colour = console.is_terminal and not console.no_color
    sys.stdout.write(explain(recipe.stages, recipe.schedule, colour=colour) + "\n")  # it brings its own colours
    sys.stdout.flush()

    with (
        closing(MetricsFile(output_dir / METRICS)) as metrics,
        ProgressReporter(console, recipe.num_steps) as reporter,
        watched(config),  # not while weights are written, which takes as long as it takes
    ):
        result = train(recipe, mesh, device, reporter, metrics)
    gather = result.pipe.gather
    save_safely(gather(result.params), output_dir / WEIGHTS, gather(result.state))  # before all that may fail
    show(f"{result.num_steps} steps in {result.training_seconds:.1f} s of training")
    if metrics.error is not None:
        show(f"{METRICS} lacks lines: {metrics.error}")
    try:
        draw_loss_curve(output_dir / METRICS, output_dir / PICTURE)
    except (OSError, ValueError) as error:
        show(f"{PICTURE} is not drawn: {error}")
    left = [name for name in (METRICS, PICTURE, WEIGHTS) if (output_dir / name).is_file()]
    show(f"written to {output_dir}: {', '.join(left)}")
    if result.validation_loss is not None:
        show(f"validation loss: {result.validation_loss:.4f}")
    elif recipe.validation_dataset is not None:
        show("validation loss: none, for no row of validation_dataset has a label")


def _mesh(recipe: Recipe, device: torch.device, timeout_minutes: float) -> DeviceMesh | None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    axes = recipe.axes
    if world != axes.num_processes:
        raise MeshError(
            f"distributed: {axes} needs {axes.num_processes} processes, but torchrun started {world}; "
            f"start it with --nproc-per-node {axes.num_processes}, or change the sizes"
        )
    if world == 1:
        return None
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return axes.mesh(device.type)
