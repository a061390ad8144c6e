"""How tp ranks cut a model: by the plan of its graphs, or by a table of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autofunc.errors import MeshError, ModelError
from autofunc.model import Model, cut_dims
from autofunc.shard.options import Sharding
from autofunc.spreading import DERIVED, AxisPlan, Cut


@dataclass(frozen=True)
class CutOverTP:
    """How tp ranks share a model."""

    params: Mapping[str, Cut]  # by canonical path; all others are whole on every rank
    over: AxisPlan | None = None  # if the model's graphs are per-rank ones


def by_layer(cut: CutOverTP, model: Model, size: int, sequence: bool) -> AxisPlan:
    """How tp ranks share layers that are functions where these run as graphs, as cp ranks record them.

    Whatever is whole is summed over ranks once a step, whether they have terms of its gradient or the first has all of it.
    """
    whole = {path for path in model.spec if path not in model.ties and path not in cut.params}
    return AxisPlan("tp", size, cut.params, frozenset(whole), sequence, "its placement table", by_layer=True)


def cut_over_tp(model: Model, size: int, sharding: Sharding) -> CutOverTP:
    """Decide how `size` tp ranks cut a model.

    Raises:
        MeshError: if the model has no placement table, or something does not divide.
        ModelError: for a table that does not fit the model, even if there is nothing to cut.
    """
    canonical = {path: leaf for path, leaf in model.spec.items() if path not in model.ties}
    given = sharding.tensor_parallel
    if size == 1:
        if given is None or isinstance(given, str):
            return CutOverTP({})
        table = None  # its patterns are checked all the same
        if model.over_ranks("tp", 1, given, sequence=False) is None:
            table = sharding.table(model.tensor_parallel)
        if table is not None:
            cut_dims(table, canonical, 1)
        return CutOverTP({})
    if model.uncut is not None:
        raise MeshError(f"the mesh has tp={size}, but {model.uncut}; use tp=1, or a model of named layers with a table")
    over = model.over_ranks("tp", size, given, sequence=sharding.sequence_parallel)
    if over is not None:
        return CutOverTP(over.cuts, over)
    if given == DERIVED:
        raise ModelError(f"tensor_parallel={given!r} is read from the graph of a captured module; {model.title} is not one")
    table = sharding.table(model.tensor_parallel)
    if table is None:
        raise MeshError(
            f"the mesh has tp={size}, but the model has no placement table for its parameters; give it one "
            "(af.Model(..., tensor_parallel=...) or af.Sharding(tensor_parallel={'*.weight': 'shard(0)'})), or use tp=1"
        )
    dims = cut_dims(model.spread_by(table), canonical, size)
    return CutOverTP({path: Cut(dim, (canonical[path].shape[dim],)) for path, dim in dims.items()})
