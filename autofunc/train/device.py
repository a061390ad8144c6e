"""The device a process of a run computes on."""

from __future__ import annotations

import os
from typing import Literal

import torch

from autofunc.errors import MeshError

Wanted = Literal["cpu", "cuda"] | None
"""Values of `distributed.device`."""


def check_devices(wanted: Wanted, num_processes: int) -> None:
    """Refuse more processes than devices, before any process starts.

    Args:
        wanted: None for GPUs if there are any.
        num_processes: on this machine.

    Raises:
        MeshError: with both numbers.
    """
    found = torch.cuda.device_count()
    if wanted == "cpu" or (wanted is None and found == 0):
        return
    if num_processes > found:
        raise MeshError(
            f"distributed: {num_processes} processes need a GPU each, and this machine has {found or 'none'}; use fewer "
            "ranks, or set distributed.device: cpu"
        )


def on_gpus(wanted: Wanted) -> bool:
    """Return whether processes compute on GPUs."""
    return wanted == "cuda" or (wanted is None and torch.cuda.device_count() > 0)


def take_device(wanted: Wanted) -> torch.device:
    """Return the CPU, or the GPU with this process's local rank, and make it the process's current device.

    Raises:
        MeshError: if there are fewer GPUs than processes.
    """
    check_devices(wanted, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not on_gpus(wanted):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device)
    return device
