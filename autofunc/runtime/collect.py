"""Collecting a tree on the host of one process for writing; the others hold no more than one of its tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.mesh import over_host

Layout = tuple[tuple[int, ...], torch.dtype]


def collect_tree(
    layouts: Mapping[str, Layout],
    whole: Callable[[str], Tensor],
    ranks: Sequence[int],
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the union of all ranks' flat trees on the first rank, on its host; the other ranks return an empty dict.

    Tensors are sent one at a time, alternating between ranks, so that no rank waits until another has sent all of its own.
    A path held by several ranks comes from the first of them.

    Args:
        layouts: of this rank's tensors, in the order of the calls of `whole`.
        whole: returns one of this rank's tensors whole; it is freed before the next call.
        ranks: global ranks of the group, in order.
        group: their process group.
        device: of this process; tensors are sent from it if the group has no backend for the host.
    """
    described: list[Any] = [None] * len(ranks)
    dist.all_gather_object(described, dict(layouts), group=group)
    owner = {path: rank for rank, paths in reversed([*zip(ranks, described, strict=True)]) for path in paths}
    road = over_host(group, device)
    first, here = ranks[0], dist.get_rank()
    full: dict[str, Tensor] = {}
    for turn in zip_longest(*described):
        for rank, path in zip(ranks, turn, strict=True):
            if path is None:
                continue
            if rank == here == first:
                full[path] = whole(path).cpu()
            elif rank == here:
                _send(whole(path), first if owner[path] == rank else None, group, road)
            elif here == first and owner[path] == rank:
                full[path] = _received(described[ranks.index(rank)][path], rank, group, road)
    return full


def _send(leaf: Tensor, to: int | None, group: dist.ProcessGroup, road: torch.device) -> None:
    if to is not None and leaf.numel():
        dist.send(leaf.detach().to(road).contiguous(), to, group=group)


def _received(layout: Layout, source: int, group: dist.ProcessGroup, road: torch.device) -> Tensor:
    leaf = torch.empty(layout[0], dtype=layout[1], device=road)
    if leaf.numel():
        dist.recv(leaf, source, group=group)
    return leaf.cpu()
