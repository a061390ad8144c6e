"""The order of elements in fused weights that tp ranks cut part by part, for code that knows only their paths.

A rank's share of such a weight is not a range of the whole (some of the queries, of the keys, of the values), which a
DTensor cannot express. So leaves lie rank by rank, and whole tensors are put in order before they leave a process: by
`Parameters`, which knows its model, and for checkpoints by the cuts remembered here as long as the process group lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from autofunc.errors import AutofuncError
from autofunc.shard.dtensors import cut_as, gathered, local
from autofunc.spreading import Cut, piece_of, put_together

_known: WeakKeyDictionary[dist.ProcessGroup, dict[str, set[Cut]]] = WeakKeyDictionary()


def remember(group: dist.ProcessGroup, cuts: Mapping[str, Cut]) -> None:
    """Remember how a model's parameters are cut over a tp axis.

    Args:
        group: the axis.
        cuts: by canonical path.
    """
    known = _known.setdefault(group, {})
    for path, cut in cuts.items():
        known.setdefault(path, set()).add(cut)


def fused_cut(leaf: Tensor, path: str) -> Cut | None:
    """Return how a leaf that lies in parts is cut; None for any other.

    Raises:
        AutofuncError: if models of this process cut parameters of this path into different parts.
    """
    axes = leaf.device_mesh.mesh_dim_names or () if isinstance(leaf, DTensor) else ()
    if not isinstance(leaf, DTensor) or "tp" not in axes:
        return None
    cuts = {
        cut for cut in _known.get(leaf.device_mesh.get_group("tp"), {}).get(path, ())
        if leaf.dim() > cut.dim and leaf.shape[cut.dim] == cut.whole
    }  # fmt: skip
    if all(len(cut.parts) == 1 for cut in cuts):
        return None
    if len(cuts) > 1:
        raise AutofuncError(
            f"models on this mesh cut {path!r} into different parts ({', '.join(str(cut.parts) for cut in cuts)}), so a "
            "checkpoint cannot tell which applies; use a mesh for each"
        )
    return next(iter(cuts))


def in_order(leaf: Tensor, cut: Cut) -> Tensor:
    """Gather a leaf that lies in parts, in the order of the whole; all ranks of its axes call it."""
    assert isinstance(leaf, DTensor)
    return put_together(gathered(leaf).chunk(leaf.device_mesh.get_group("tp").size(), cut.dim), cut)


def fill(leaf: Tensor, whole: Tensor, cut: Cut) -> None:
    """Write this process's part of a whole tensor into a leaf that lies in parts; nothing is sent."""
    assert isinstance(leaf, DTensor)
    size = leaf.device_mesh.get_group("tp").size()
    rank_by_rank = torch.cat([piece_of(whole, cut, size, rank) for rank in range(size)], cut.dim)
    local(leaf).copy_(local(cut_as(leaf, rank_by_rank.to(local(leaf).device))))
