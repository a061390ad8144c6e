"""A process group of two for every directed edge, named by the edge.

`torch.distributed.new_group(use_local_synchronization=True)` would be the public way. It names a group after the number
of groups its process already knows, which differs between ranks that hold different edges: the two ends then wait for
each other for ever. So the backends are made here directly, over the store of the pp group, under names that both ends
know. Private parts of torch used, tried with 2.13.0: `ProcessGroup._get_backend`, `Options._timeout`,
`FakeProcessGroup`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store

from autofunc.errors import MeshError

# Kept for as long as the pp group they belong to: connections are costly, and pipelines on one mesh run one after the
# other on every rank, so they can share them. Bounded by the edges there can be: pairs of stages, and a few for each tie.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, int, int], Any]] = WeakKeyDictionary()


def edge_group(pp_group: dist.ProcessGroup, name: str, source: int, target: int, device: torch.device) -> Any:
    """The group of an edge from pp rank `source` (rank 0 of the group) to `target` (rank 1). Both ends call it.

    Args:
        pp_group: the process group of the pp axis.
        name: of the edge, unique among edges between these ranks.
        source: pp rank that sends.
        target: pp rank that receives.
        device: where the tensors live: decides between gloo and nccl.

    Returns:
        A c10d backend with `send(tensors, rank, tag)` and `recv(tensors, rank, tag)`, which return a `Work`.
    """
    known = _made.setdefault(pp_group, {})
    edge = (name, source, target)
    if edge not in known:
        own = 0 if pp_group.rank() == source else 1
        store = PrefixStore(f"autofunc/{name}/{source}/{target}", pp_group.get_group_store())
        known[edge] = _backend(store, own, device, pp_group)
    return known[edge]


def timeout_of(group: dist.ProcessGroup, device: torch.device | None = None) -> timedelta:
    """How long the ranks of a group wait for each other; by the backend for a device where it has several."""
    found: timedelta = group._get_backend(device or group._device_types[0]).options._timeout
    return found


def _backend(store: Store, rank: int, device: torch.device, pp_group: dist.ProcessGroup) -> Any:
    if dist.get_backend(pp_group) == "fake":  # torch's group that sends nowhere: for measuring and trying one rank alone
        return FakeProcessGroup._create_internal(rank, 2)
    timeout = timeout_of(pp_group, device)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, 2, timeout=timeout)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    raise MeshError(f"there is no transport between {device.type} devices; expected cpu (gloo) or cuda (nccl)")
