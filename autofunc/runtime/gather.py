"""Collecting a tree from all pp ranks: off the step path, so shapes travel as objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tree(flat: Mapping[str, Tensor], ranks: Sequence[int], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The union of all ranks' flat trees, on every rank. A path on several ranks comes from the first of them.

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
        for path, (shape, dtype, device) in paths.items():  # of the device its owner has it on: this rank may have none
            if path not in full:
                is_mine = root == dist.get_rank()
                leaf = flat[path].detach().clone() if is_mine else torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(leaf, root, group=group)
                full[path] = leaf
    return full
