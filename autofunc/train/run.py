"""One process of a training run: sets up its device and mesh, trains, and writes the results on the first rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from autofunc import tree
from autofunc.automodel import write_pretrained
from autofunc.checkpoint.write import of_first
from autofunc.config import FinetuneConfig
from autofunc.errors import MeshError
from autofunc.explain import explain
from autofunc.schedule import write_file
from autofunc.shown import literal, size_in_words
from autofunc.splitting import parameter_count
from autofunc.timing import clock
from autofunc.train.adapters import described
from autofunc.train.autoschedule import find_schedule
from autofunc.train.checkpoints import Checkpoints
from autofunc.train.datasets import title
from autofunc.train.device import take_device
from autofunc.train.loop import TrainResult, train
from autofunc.train.metrics import draw_loss_curve
from autofunc.train.output import METRICS, PICTURE, SCHEDULE
from autofunc.train.progress import ProgressReporter, Silent
from autofunc.train.recipe import Recipe
from autofunc.train.records import Records
from autofunc.train.resume import folder_of, source, step_at
from autofunc.train.role import restarts
from autofunc.train.step_folders import name_of
from autofunc.train.threads import threads
from autofunc.train.trackers import open_trackers
from autofunc.train.watched import watched
from autofunc.train.weights import save_result, written_part
from autofunc.tree import Nested


def run(recipe: Recipe, config: FinetuneConfig, output_dir: Path, command: str = "") -> None:
    """Train in this process: alone, or as one of the ranks that torchrun or `train.launch` started.

    Args:
        recipe: what to do.
        config: what it was made of.
        output_dir: where results go.
        command: what to type to go on with the run when it was told to end.

    Raises:
        MeshError: when the number of processes is not what the configuration needs.
    """

    def work(mesh: DeviceMesh | None, device: torch.device, folder: Path) -> None:
        if mesh is None or dist.get_rank() == 0:
            _lead(recipe, mesh, device, folder, config, command)
        else:
            _follow(recipe, mesh, device, folder, config)

    in_mesh(recipe, config, output_dir, work)


def in_mesh(
    recipe: Recipe,
    config: FinetuneConfig,
    output_dir: Path,
    work: Callable[[DeviceMesh | None, torch.device, Path], None],
) -> None:
    """Do this process's part of a run on its device, and with the others, if there are any.

    Args:
        recipe: of the run.
        config: what it was made of.
        output_dir: where results go; work gets that of the first process.
        work: what is done.

    Raises:
        MeshError: when the number of processes is not what the configuration needs.
    """
    device = take_device(config.distributed.device)
    mesh = _mesh(recipe, device, config.distributed.timeout_minutes)
    clock.done("joining the process group")
    with threads(config.distributed.threads_per_rank):
        work(mesh, device, of_first(output_dir))  # under torchrun each process has found a folder by itself
    if mesh is not None:  # not after an error: that must be recorded before the others see the connection close
        dist.destroy_process_group()


def _follow(
    recipe: Recipe, mesh: DeviceMesh, device: torch.device, output_dir: Path, config: FinetuneConfig
) -> None:  # fmt: skip
    """Any other rank's run."""
    if recipe.searches:
        recipe = replace(recipe, schedule=find_schedule(recipe, mesh, device, None).schedule)
    begun_from, checkpoints = _checkpoints(config, output_dir, lambda _: None)
    with watched(config.distributed):
        result = train(recipe, mesh, device, Silent(), None, checkpoints, begun_from)
    if not result.stopped:
        _whole(recipe, config, result)


def _checkpoints(
    config: FinetuneConfig, output_dir: Path, show: Callable[[str], None]
) -> tuple[Path | None, Checkpoints | None]:
    """What the run goes on from, as the first rank sees it, and what writes checkpoints."""
    section = config.checkpoint
    begun_from = of_first(source(section, output_dir))
    if section is None or not section.enabled:
        return begun_from, None
    return begun_from, Checkpoints(folder_of(section, output_dir), section, config.step_scheduler, show)


def _writes_weights(config: FinetuneConfig) -> bool:
    return config.checkpoint is None or config.checkpoint.save_consolidated is not False


def _whole(recipe: Recipe, config: FinetuneConfig, result: TrainResult) -> tuple[Nested, Nested]:
    """What a run has trained, from all ranks: as much of it as is written. All ranks call it."""
    pipe = result.pipe
    params: Nested = result.params
    if config.export is None:
        params = written_part(recipe.model, params) if _writes_weights(config) else {}
    return pipe.gather(params), pipe.gather(result.state)


def _lead(
    recipe: Recipe, mesh: DeviceMesh | None, device: torch.device, output_dir: Path, config: FinetuneConfig, command: str
) -> None:
    """The first rank's run: the others' and everything that is shown or written."""
    console = Console(file=sys.stdout)

    def show(text: str) -> None:
        console.print(literal(text))

    for note in recipe.notes:
        show(f"note: {note}")
    show(f"model: {parameter_count(recipe.model):,} parameters on {device.type}")
    trained = described(recipe.model)
    if trained is not None:
        show(trained)
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

    begun_from, checkpoints = _checkpoints(config, output_dir, show)
    done = step_at(begun_from)
    if begun_from is not None:
        show(f"going on from {begun_from}, after step {done}")
    trackers = open_trackers(config, output_dir, done)
    with (
        Records(output_dir, done, trackers, config.step_scheduler.log_remote_every_steps, show) as metrics,
        ProgressReporter(console, recipe.num_steps) as reporter,
        watched(config.distributed),  # not while weights are written, which takes as long as it takes
    ):
        result = train(recipe, mesh, device, reporter, metrics, checkpoints, begun_from)
    saved: list[str] = []
    if not result.stopped:
        params, state = _whole(recipe, config, result)
        if _writes_weights(config):  # before all that may fail
            saved += save_result(recipe.model, written_part(recipe.model, params), state, output_dir)
        if config.export is not None:
            write_pretrained(recipe.model, {**tree.flatten(params), **tree.flatten(state)}, output_dir / config.export)
            saved.append(f"{config.export}/")
    peaks = result.peak_memory_bytes
    most = size_in_words(max(peaks)) + (f" on rank {peaks.index(max(peaks))}" if len(peaks) > 1 else "")
    show(f"{result.num_steps - done} steps in {result.training_seconds:.1f} s of training, peak memory {most}")
    if metrics.error is not None:
        show(f"{METRICS} lacks lines: {metrics.error}")
    try:
        draw_loss_curve(output_dir / METRICS, output_dir / PICTURE)
    except (OSError, ValueError) as error:
        show(f"{PICTURE} is not drawn: {error}")
    left = [*(name for name in (METRICS, PICTURE) if (output_dir / name).is_file()), *saved]
    show(f"written to {output_dir}: {', '.join(left)}")
    if checkpoints is not None:
        show(f"checkpoints: {checkpoints.folder}, the latest {name_of(result.num_steps)}")
    if result.stopped:
        show(f"told to end by SIGTERM, after step {result.num_steps} of {recipe.num_steps}. To go on:")
        console.print(literal(f"  {command}"), soft_wrap=True)  # in one line, to be copied
        return
    if result.ended_early:
        show(f"ended after step {result.num_steps} of {recipe.num_steps}: the validation loss gets no better")
    if result.validated is not None:
        show(result.validated.said())
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
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    # torch's agent keeps its store when it starts workers again, and with it the addresses of those that are gone
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return axes.mesh(device.type)
