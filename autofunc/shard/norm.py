"""The norm of gradients that are distributed over a mesh.

Private parts of torch used, tried with 2.13.0: `_foreach_norm` and `_foreach_mul`, which take a few kernels for all leaves.
`torch.nn.utils.get_total_norm`, which is public, sums squares in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autofunc.mesh import AXES, coordinate, sum_over
from autofunc.shard.dtensors import like, local


def global_norm(grads: Mapping[str, Tensor], mesh: DeviceMesh | None, device: torch.device) -> Tensor:
    """Return the 2-norm of all gradients: 0-dim fp32, the same on every process, which all call it.

    One process counts each element: for copies, the first rank of every axis over which they are replicated. Squares are
    summed in fp64.

    Args:
        grads: gradients that this process's pp rank counts.
        mesh: of the pipeline.
        device: of the result.
    """
    counted = [local(leaf) for leaf in grads.values() if _is_first_copy(leaf, mesh)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for leaves in _alike(counted).values():
        total += torch.stack(torch._foreach_norm(leaves, 2, dtype=torch.float64)).square().sum().to(device)
    return sum_over(mesh, AXES, total).sqrt().float()


def clip_by_norm(grads: Mapping[str, Tensor], norm: Tensor, max_norm: float) -> dict[str, Tensor]:
    """Scale gradients by `max_norm / norm` if the norm is larger, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        grads: of this process.
        norm: of all gradients, 0-dim fp32, from `global_norm`.
        max_norm: the largest norm that is left unscaled.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    parts = {path: local(leaf) for path, leaf in grads.items()}
    scaled = dict(grads)
    for (device, dtype), leaves in _alike(list(parts.values())).items():
        paths = [path for path, part in parts.items() if (part.device, part.dtype) == (device, dtype)]
        found = torch._foreach_mul(leaves, factor.to(device, dtype))
        scaled.update({path: like(grads[path], part) for path, part in zip(paths, found, strict=True)})
    return scaled


def _alike(leaves: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Group leaves by device and dtype, in order: the `_foreach` functions need both alike."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for leaf in leaves:
        found.setdefault((leaf.device, leaf.dtype), []).append(leaf)
    return found


def _is_first_copy(leaf: Tensor, mesh: DeviceMesh | None) -> bool:
    cut = set()
    if isinstance(leaf, DTensor):
        names = leaf.device_mesh.mesh_dim_names or ()
        cut = {name for name, placement in zip(names, leaf.placements, strict=True) if not placement.is_replicate()}
    if "ep" in cut:  # along dp_shard each rank has different experts, or a different part of the same
        cut.add("dp_shard")
    return all(coordinate(mesh, axis) == 0 for axis in AXES[1:] if axis not in cut)
