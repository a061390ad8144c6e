"""One process of a training run: set up device and mesh, train, and write results on the first rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from autofunc.checkpoint.write import of_first
from autofunc.config import FinetuneConfig
from autofunc.errors import MeshError
from autofunc.runtime.pair_groups import disconnect_all
from autofunc.timing import clock
from autofunc.train.device import take_device
from autofunc.train.lead import follow, lead
from autofunc.train.logs import named_log
from autofunc.train.recipe import Recipe
from autofunc.train.role import restarts, was_checked
from autofunc.train.threads import threads


def run(recipe: Recipe, config: FinetuneConfig, output_dir: Path, command: str = "", *, quiet: bool = False) -> None:
    """Train in this process: alone, or as one of the ranks started by torchrun or `train.launch`.

    Args:
        recipe: of the run.
        config: the recipe's configuration.
        output_dir: for results.
        command: resumes the run after it was told to end.
        quiet: print only the last line.

    Raises:
        MeshError: if the number of processes does not fit the configuration.
    """

    def work(mesh: DeviceMesh | None, device: torch.device, folder: Path) -> None:
        rank = 0 if mesh is None else dist.get_rank()
        with nullcontext() if was_checked() else named_log(folder, rank, quiet=quiet):  # `launch` set up the log
            if rank == 0:
                lead(recipe, mesh, device, folder, config, command)
            elif mesh is not None:
                follow(recipe, mesh, device, folder, config)

    in_mesh(recipe, config, output_dir, work)


def in_mesh(
    recipe: Recipe,
    config: FinetuneConfig,
    output_dir: Path,
    work: Callable[[DeviceMesh | None, torch.device, Path], None],
) -> None:
    """Do this process's part of a run on its device, in the run's mesh.

    Args:
        recipe: of the run.
        config: the recipe's configuration.
        output_dir: for results; all processes use the first one's.
        work: to do.

    Raises:
        MeshError: if the number of processes does not fit the configuration.
    """
    device = take_device(config.distributed.device)
    mesh = _mesh(recipe, device, config.distributed.timeout_minutes)
    clock.done("joining the process group")
    with threads(config.distributed.threads_per_rank):
        work(mesh, device, of_first(output_dir))  # under torchrun each process chose a folder separately
    if mesh is not None:  # skipped after an error, which must be recorded before peers see the connection close
        disconnect_all()
        dist.destroy_process_group()


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
    join(device, timeout_minutes)
    return axes.mesh(device.type)


def join(device: torch.device, timeout_minutes: float) -> None:
    """Join the other processes that the environment names in a process group.

    Args:
        device: the device this process computes on.
        timeout_minutes: how long they wait for each other.
    """
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    # torch's agent keeps its store across restarts, with the addresses of the earlier workers
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo carries objects
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
