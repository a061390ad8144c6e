"""Fused weights that tp ranks cut part by part: in what order their numbers lie, for those who know but their paths.

A rank's numbers of such a weight are no range of the whole (a part of the queries, of the keys, of the values), which a
DTensor cannot say. So leaves lie rank by rank, and what leaves a process as a whole is put in order: by `Parameters`, which
knows its model, and in checkpoints by what is remembered here for as long as the process group lives.
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
    """Note how a model's parameters are cut over a tp axis.

    Args:
        group: the axis.
        cuts: by canonical path.
    """
    known = _known.setdefault(group, {})
    for path, cut in cuts.items():
        known.setdefault(path, set()).add(cut)


def fused_cut(leaf: Tensor, path: str) -> Cut | None:
    """How a leaf is cut that lies in parts; None for any other.

    Raises:
        AutofuncError: where models of this process have cut parameters of this path in different parts.
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
            f"models on this mesh cut {path!r} in different parts ({', '.join(str(cut.parts) for cut in cuts)}), so that a "
            "checkpoint cannot tell; use a mesh for each"
        )
    return next(iter(cuts))


def in_order(leaf: Tensor, cut: Cut) -> Tensor:
    """All of a leaf that lies in parts, in the order of the whole; all ranks of its axes call it."""
    assert isinstance(leaf, DTensor)
    return put_together(gathered(leaf).chunk(leaf.device_mesh.get_group("tp").size(), cut.dim), cut)


def fill(leaf: Tensor, whole: Tensor, cut: Cut) -> None:
    """Write this process's part of a whole into a leaf that lies in parts; nothing is sent."""
    assert isinstance(leaf, DTensor)
    size = leaf.device_mesh.get_group("tp").size()
    rank_by_rank = torch.cat([piece_of(whole, cut, size, rank) for rank in range(size)], cut.dim)
    local(leaf).copy_(local(cut_as(leaf, rank_by_rank.to(local(leaf).device))))
