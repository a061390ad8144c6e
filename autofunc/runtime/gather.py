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
    dist.all_gather_object(described, {p: (tuple(leaf.shape), leaf.dtype) for p, leaf in flat.items()}, group=group)
    device = next((leaf.device for leaf in flat.values()), torch.device("cpu"))
    full: dict[str, Tensor] = {}
    for root, paths in zip(ranks, described, strict=True):
        for path, (shape, dtype) in paths.items():
            if path not in full:
                mine = root == dist.get_rank()
                leaf = flat[path].detach().clone() if mine else torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(leaf, root, group=group)
                full[path] = leaf
    return full
