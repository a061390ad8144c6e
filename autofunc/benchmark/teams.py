"""The processes of each contender: the first `pp` of those started, or one process that runs all ranks."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autofunc.mesh import make_mesh


class Team(NamedTuple):
    """The processes of pipelines with one number of ranks, as one process sees them."""

    plays: bool  # whether this process is one of them
    rank: int  # this process's pp rank; 0 in one process that runs all of them
    size: int  # number of processes
    mesh: DeviceMesh | None  # None: all pp ranks are in one process
    group: dist.ProcessGroup | None  # of the processes; None: there is no process group at all


class World:
    """All processes of a benchmark. Every process creates one, and makes the same calls as the others.

    Args:
        device: the device this process computes on.
    """

    def __init__(self, device: torch.device) -> None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.device = device
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._teams: dict[int, Team] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def team(self, pp: int) -> Team:
        """Return the processes of pipelines with this many ranks. All processes call it, in the same order."""
        if pp not in self._teams:
            self._teams[pp] = self._made(pp)
        return self._teams[pp]

    def _made(self, pp: int) -> Team:
        if self.size == 1:
            return Team(True, 0, 1, None, None)
        plays = self.rank < pp
        if pp == 1:
            return Team(plays, 0, 1, None, self.group([0]))
        if pp == self.size:
            mesh = make_mesh(pp, device_type=self.device.type)
            return Team(True, self.rank, pp, mesh, mesh.get_group("pp"))
        mesh = DeviceMesh(self.device.type, list(range(pp)), mesh_dim_names=("pp",))
        return Team(plays, self.rank, pp, mesh, mesh.get_group("pp") if plays else None)

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Return a process group of these ranks; None on other processes. All processes call it, in the same order."""
        key = tuple(ranks)
        if key not in self._groups:
            made = dist.new_group(list(ranks))
            self._groups[key] = made if self.rank in key else None
        return self._groups[key]

    def meet(self) -> None:
        """Wait until all processes are here, and their devices are idle."""
        self.settle()
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))

    def settle(self) -> None:
        """Wait for this process's device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def of_all(self, own: Any) -> list[Any]:
        """Gather a value from every process, in order of rank."""
        found: list[Any] = [own]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, own)
        return found

    def of_first(self, own: Any) -> Any:
        """Return the first process's value on all processes."""
        return self.of_all(own)[0]


def described(device: torch.device) -> dict[str, Any]:
    """Describe what a benchmark runs on, as JSON values."""
    found: dict[str, Any] = {
        "torch": torch.__version__, "python": platform.python_version(), "processor": processor(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(device),
    }  # fmt: skip
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    if hasattr(os, "getloadavg"):
        found["load"] = [round(each, 2) for each in os.getloadavg()]
    return found


def processor() -> str:
    """Return the CPU's name, as the system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
