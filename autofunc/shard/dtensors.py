"""From DTensors to local tensors and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(leaf: Tensor) -> Tensor:
    """This process's part of a leaf."""
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def like(leaf: Tensor, part: Tensor) -> Tensor:
    """A leaf that lies as another does, on its device: of this process it has `part`, of the other's local shape."""
    if not isinstance(leaf, DTensor):
        return part
    if part.device != leaf.to_local().device:  # offloaded: wrapping would move it to the mesh's device
        made = torch.empty_like(leaf, dtype=part.dtype)
        local(made).copy_(part)
        return made
    return on_mesh(leaf, part)


def on_mesh(leaf: DTensor, part: Tensor) -> DTensor:
    """This process's part, on the mesh's device, as a DTensor of the same shape and placements."""
    return DTensor.from_local(
        part, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )  # fmt: skip


def settled(part: Tensor) -> Tensor:
    """A collective's result, waited for: outside the stage nobody else would."""
    return part.wait() if hasattr(part, "wait") else part
