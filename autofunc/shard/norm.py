"""The norm of gradients that are spread over a mesh."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autofunc.mesh import AXES, coordinate, sum_over
from autofunc.shard.dtensors import like, local


def global_norm(grads: Mapping[str, Tensor], mesh: DeviceMesh | None, device: torch.device) -> Tensor:
    """The 2-norm of all gradients: 0-dim fp32, the same on every process, which all call it.

    Each number is counted by one process: of copies by the first rank of every axis over which they are copies. Squares are
    summed in fp64.

    Args:
        grads: those that this process's pp rank counts.
        mesh: of the pipeline.
        device: of the result.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for leaf in grads.values():
        if _is_first_copy(leaf, mesh):
            total += torch.linalg.vector_norm(local(leaf), dtype=torch.float64).square().to(device)
    return sum_over(mesh, AXES, total).sqrt().float()


def clip_by_norm(grads: Mapping[str, Tensor], norm: Tensor, max_norm: float) -> dict[str, Tensor]:
    """Gradients scaled by `max_norm / norm` where the norm is larger, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        grads: of this process.
        norm: of all gradients, 0-dim fp32: what `global_norm` gives.
        max_norm: the largest norm that stays.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {path: _scaled(leaf, factor) for path, leaf in grads.items()}


def _scaled(leaf: Tensor, factor: Tensor) -> Tensor:
    part = local(leaf)
    return like(leaf, part * factor.to(part.device, part.dtype))


def _is_first_copy(leaf: Tensor, mesh: DeviceMesh | None) -> bool:
    cut = set()
    if isinstance(leaf, DTensor):
        names = leaf.device_mesh.mesh_dim_names or ()
        cut = {name for name, placement in zip(names, leaf.placements, strict=True) if not placement.is_replicate()}
    return all(coordinate(mesh, axis) == 0 for axis in AXES[1:] if axis not in cut)
