"""The device mesh: each process's coordinate along each axis.

Private parts of torch used, tried with 2.13.0: `ProcessGroup._get_backend` and `Options._timeout`, for timeouts of groups.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autofunc.errors import MeshError, one_of

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""In rank order: ranks adjacent along tp have adjacent numbers, so they share a machine if possible."""
DATA_AXES = ("dp_replicate", "dp_shard")
"""Axes whose ranks see different rows. Ranks along cp see different tokens of the same rows."""


def make_mesh(
    pp: int = 1, dp_replicate: int = 1, dp_shard: int = 1, cp: int = 1, tp: int = 1, *, device_type: str | None = None
) -> DeviceMesh:
    """Make the device mesh of all processes, with the axes "pp", "dp_replicate", "dp_shard", "cp" and "tp", in that order.

    Starts the default process group if there is none: call it in processes started by `torchrun`. All axes use the default
    group's timeout. With `cp=1` there is no axis "cp".

    Args:
        pp: pipeline ranks.
        dp_replicate: groups of data parallel ranks, each of which holds all parameters (of its stages).
        dp_shard: data parallel ranks in a group, which share its parameters.
        cp: ranks that share each row's tokens.
        tp: ranks that compute each layer together.
        device_type: "cpu" or "cuda"; by default cuda if available.

    Raises:
        MeshError: if the number of processes is not the product of the axes, or torchrun's variables are missing.
    """
    sizes = (pp, dp_replicate, dp_shard, cp, tp)
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1) or "pp=1"
    needed = math.prod(sizes)
    if min(sizes) < 1:
        raise MeshError(f"a mesh of {given}: every axis needs at least one rank")
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        raise MeshError(
            "make_mesh needs the processes that torchrun starts (WORLD_SIZE is not set). Start the program with "
            f"'torchrun --nproc-per-node {needed} ...', or pass mesh=None to run every pp rank in this one process."
        )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if needed != world:
        raise MeshError(
            f"a mesh of {given} needs {needed} processes, but there are {world}; the sizes must multiply to {world}"
        )
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    local, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device_type == "cuda" and local > found:
        raise MeshError(
            f"{local} processes on this machine need a GPU each, and it has {found or 'none'}; use fewer, or "
            'device_type="cpu"'
        )
    made = {axis: size for axis, size in zip(AXES, sizes, strict=True) if axis != "cp" or size > 1}
    mesh = init_device_mesh(device_type, tuple(made.values()), mesh_dim_names=tuple(made))
    _wait_as_by_default(mesh)
    return mesh


def folded(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Return the mesh that parameters are sharded on: ranks along cp share them and sum gradients, as along dp_shard.

    Its axis "dp_shard" combines dp_shard and cp, as `dp_shard_cp` in torchtitan; without cp it is the mesh itself. All
    processes call it.

    Raises:
        MeshError: for a submesh.
    """
    if mesh is None or axis_size(mesh, "cp") == 1:
        return mesh
    if mesh not in _folded:
        if mesh.mesh.numel() != dist.get_world_size():
            raise MeshError("a mesh with an axis cp must include all processes; got a submesh, see af.make_mesh")
        names = [name for name in mesh.mesh_dim_names or () if name not in ("dp_shard", "cp")]
        ranks = mesh.mesh.movedim([(mesh.mesh_dim_names or ()).index(name) for name in names], list(range(len(names))))
        at = sum(name in ("pp", "dp_replicate") for name in names)
        ranks = ranks.flatten(len(names)).movedim(-1, at)
        made = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(*names[:at], "dp_shard", *names[at:]))
        _wait_as_by_default(made)
        _folded[mesh] = made
    return _folded[mesh]


_folded: WeakKeyDictionary[DeviceMesh, DeviceMesh] = WeakKeyDictionary()  # creating groups is expensive


def expert_mesh(mesh: DeviceMesh, size: int) -> DeviceMesh:
    """Return the mesh that experts are spread on: its axis "dp_shard" is split into "edp" and "ep".

    Ranks along "ep", which are adjacent, hold different experts. Ranks along "edp" share the parameters of the same
    experts, as ranks along "dp_shard" share all other parameters. Cached per mesh; all processes call it.

    Args:
        mesh: of all processes, with an axis "dp_shard" that `size` divides.
        size: ranks along "ep".

    Raises:
        MeshError: for a submesh.
    """
    made = _expert_meshes.setdefault(mesh, {})
    if size not in made:
        if mesh.mesh.numel() != dist.get_world_size():
            raise MeshError("experts are spread over a mesh of all processes; got a submesh, see af.make_mesh")
        shard = axis_size(mesh, "dp_shard")
        sizes: dict[str, int] = {}
        for axis in mesh.mesh_dim_names or ():
            if axis == "dp_shard":
                sizes |= {"edp": shard // size, "ep": size}
            elif axis_size(mesh, axis) > 1:
                sizes[axis] = axis_size(mesh, axis)
        made[size] = DeviceMesh(mesh.device_type, mesh.mesh.view(*sizes.values()), mesh_dim_names=tuple(sizes))
        _wait_as_by_default(made[size])
    return made[size]


_expert_meshes: WeakKeyDictionary[DeviceMesh, dict[int, DeviceMesh]] = WeakKeyDictionary()  # creating groups is expensive


def _wait_as_by_default(mesh: DeviceMesh) -> None:
    """Give every axis the timeout of the default group."""
    default = dist.group.WORLD
    if default is not None and dist.get_backend() != "fake":  # the fake group never waits
        for axis in mesh.mesh_dim_names or ():
            _set_timeout(mesh.get_group(axis), timeout_of(default))


def timeout_of(group: dist.ProcessGroup, device: torch.device | None = None) -> timedelta:
    """Return a group's timeout; for a device if the group has several backends."""
    found: timedelta = group._get_backend(device or group._device_types[0]).options._timeout
    return found


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set a group's timeout: torch gives groups of a mesh with several axes half an hour, whatever the default's is."""
    for device in group._device_types:
        group._get_backend(device).set_timeout(timeout)


def over_host(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Return the device for values that hosts exchange: the host, or `device` if the group has no backend for it."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device


def check_axes(mesh: DeviceMesh) -> None:
    """Refuse a mesh with unknown axes, or without a pp axis.

    Raises:
        MeshError: naming the axis.
    """
    names = mesh.mesh_dim_names or ()
    for name in names:
        if name not in AXES:
            raise MeshError(f"the mesh has an axis {name!r}; {one_of(name, AXES)} (af.make_mesh makes them)")
    if "pp" not in names:
        raise MeshError(f"the mesh has axes {names}; expected one named 'pp' (af.make_mesh makes it)")


def axis_size(mesh: DeviceMesh | None, axis: str) -> int:
    """Return the number of ranks along an axis; 1 if the mesh has no such axis."""
    names = mesh.mesh_dim_names or () if mesh is not None else ()
    return mesh.size(names.index(axis)) if mesh is not None and axis in names else 1


def coordinate(mesh: DeviceMesh | None, axis: str) -> int:
    """Return this process's place along an axis; 0 if the mesh has no such axis."""
    return mesh.get_local_rank(axis) if mesh is not None and axis_size(mesh, axis) > 1 else 0


def axis_group(mesh: DeviceMesh | None, axis: str) -> dist.ProcessGroup | None:
    """Return the processes along an axis; None if this one is alone on it."""
    return mesh.get_group(axis) if mesh is not None and axis_size(mesh, axis) > 1 else None


def data_coordinate(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Return (this process's place, number of places) among processes that see different rows."""
    size = axis_size(mesh, "dp_shard")
    return coordinate(mesh, "dp_replicate") * size + coordinate(mesh, "dp_shard"), axis_size(mesh, "dp_replicate") * size


def sum_over(mesh: DeviceMesh | None, axes: Sequence[str], tensor: Tensor) -> Tensor:
    """Sum a tensor in place over axes of the mesh, and return it. All their processes call it."""
    for axis in axes:
        group = axis_group(mesh, axis)
        if group is not None:
            dist.all_reduce(tensor, group=group)
    return tensor


def same_over(mesh: DeviceMesh | None, axes: Sequence[str], number: int, device: torch.device) -> bool:
    """Return whether all ranks along some axes have this number (32 bits). All their processes call it."""
    both = torch.tensor([number, -number], device=device)
    for axis in axes:
        group = axis_group(mesh, axis)
        if group is not None:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    most, least = both.tolist()
    return bool(most == -least)


def gather_over(mesh: DeviceMesh | None, axes: Sequence[str], tensor: Tensor) -> list[Tensor]:
    """Gather tensors of one shape from all ranks of some axes, the last axis fastest. All their processes call it."""
    tensors = [tensor.contiguous()]
    for axis in reversed(axes):
        group = axis_group(mesh, axis)
        if group is not None:
            found = []
            for each in tensors:
                parts = [torch.empty_like(each) for _ in range(group.size())]
                dist.all_gather(parts, each, group=group)
                found.append(parts)
            tensors = [each for place in zip(*found, strict=True) for each in place]
    return tensors


def share_over_pp(mesh: DeviceMesh, pp_rank: int, tensor: Tensor) -> Tensor:
    """Broadcast one pp rank's tensor to all ranks of the pp axis, in place, and return it. All their processes call it."""
    dist.broadcast(tensor, pp_ranks(mesh)[pp_rank], group=axis_group(mesh, "pp"))
    return tensor


def pp_ranks(mesh: DeviceMesh) -> list[int]:
    """Return the global ranks along this process's pp axis, by pp rank."""
    ranks: list[int] = mesh["pp"].mesh.flatten().tolist()
    return ranks
