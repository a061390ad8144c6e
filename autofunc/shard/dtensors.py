"""Between DTensors and local tensors.

Private parts of torch used, tried with 2.13.0: `DTensor._spec` and DTensor's constructor, which takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(leaf: Tensor) -> Tensor:
    """Return this process's part of a leaf."""
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def like(leaf: Tensor, part: Tensor) -> Tensor:
    """Make a leaf laid out like another, on its device, with `part`, of the other's local shape, as this process's part."""
    if not isinstance(leaf, DTensor):
        return part
    if part.device != leaf.to_local().device:  # offloaded: wrapping would move it to the mesh's device
        made = torch.empty_like(leaf, dtype=part.dtype)
        local(made).copy_(part)
        return made
    if part.dtype == leaf.dtype and not part.requires_grad:  # `from_local` would infer the layout again: 50 us a gradient
        return DTensor(part, leaf._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return on_mesh(leaf, part)


def on_mesh(leaf: DTensor, part: Tensor) -> DTensor:
    """Make a DTensor of a leaf's shape and placements from this process's part, on the mesh's device."""
    return DTensor.from_local(
        part, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )  # fmt: skip


def gathered(leaf: Tensor) -> Tensor:
    """Gather a leaf from all ranks that have a part of it, which all call it. Returns a copy, of plain tensors too."""
    with torch.no_grad():
        if not isinstance(leaf, DTensor):
            return leaf.detach().clone()
        leaf = on_mesh(leaf, leaf.to_local())  # moves an offloaded part to the mesh's device, for the collectives
        for axis in range(len(leaf.placements)):  # one at a time, dp_shard first: FSDP cuts what tp has cut
            leaf = leaf.redistribute(placements=[*leaf.placements[:axis], Replicate(), *leaf.placements[axis + 1 :]])
        whole: Tensor = leaf.to_local()
        return whole.clone()


def cut_as(leaf: Tensor, whole: Tensor) -> Tensor:
    """Cut this process's part from a whole tensor, in another leaf's layout; nothing is sent."""
    if not isinstance(leaf, DTensor):
        return whole
    with torch.no_grad():
        placements = [Replicate() for _ in leaf.placements]
        made = DTensor.from_local(whole, leaf.device_mesh, placements, run_check=False)
        for axis in reversed(range(len(placements))):  # the reverse of `gathered`
            made = made.redistribute(placements=[*placements[:axis], *leaf.placements[axis:]])
        return like(leaf, made.to_local().clone(memory_format=torch.contiguous_format))


def settled(part: Tensor) -> Tensor:
    """Wait for a collective's result: outside a stage nothing else would."""
    return part.wait() if hasattr(part, "wait") else part
