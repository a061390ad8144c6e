"""Gathering a tree from all pp ranks: off the step path, so shapes are sent as objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tree(flat: Mapping[str, Tensor], ranks: Sequence[int], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return the union of all ranks' flat trees, on every rank. A path held by several ranks comes from the first of them.

    Args:
        flat: this rank's part.
        ranks: global ranks of the group, in order.
        group: their process group.
    """
    described: list[Any] = [None] * len(ranks)
    mine = {path: (tuple(leaf.shape), leaf.dtype, leaf.device.type) for path, leaf in flat.items()}
    dist.all_gather_object(described, mine, group=group)
    full: dict[str, Tensor] = {}
    for root, paths in zip(ranks, described, strict=True):
        for path, (shape, dtype, device) in paths.items():  # on its owner's device type: this rank may not hold it
            if path not in full:
                is_mine = root == dist.get_rank()
                leaf = flat[path].detach().clone() if is_mine else torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(leaf, root, group=group)
                full[path] = leaf
    return full
