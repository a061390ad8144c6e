"""The device mesh: which process holds which coordinate of each axis."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autofunc.errors import MeshError


def make_mesh(pp: int = 1, *, device_type: str | None = None) -> DeviceMesh:
    """Make the device mesh of all processes, with the axis "pp".

    Starts the default process group when there is none yet: call it in processes started by `torchrun`.

    Args:
        pp: number of pp ranks.
        device_type: "cpu" or "cuda"; cuda by default where there is one.

    Raises:
        MeshError: when the number of processes is not the product of the axes, or there are no processes.
    """
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        raise MeshError(
            "make_mesh needs the processes that torchrun starts (WORLD_SIZE is not set). Start the program with "
            f"'torchrun --nproc-per-node {pp} ...', or pass mesh=None to run every pp rank in this one process."
        )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if pp != world:
        raise MeshError(
            f"a mesh of pp={pp} needs {pp} processes, but there are {world}; the sizes must multiply to {world}"
        )
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device_type, (pp,), mesh_dim_names=("pp",))


def pp_ranks(mesh: DeviceMesh) -> list[int]:
    """Global ranks along this process's pp axis, by pp rank.

    Raises:
        MeshError: when the mesh has no such axis.
    """
    if "pp" not in (mesh.mesh_dim_names or ()):
        raise MeshError(f"the mesh has axes {mesh.mesh_dim_names}; expected one named 'pp' (af.make_mesh makes it)")
    ranks: list[int] = mesh["pp"].mesh.flatten().tolist()
    return ranks
