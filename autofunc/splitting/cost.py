"""What a layer costs, to balance stages by."""

from __future__ import annotations

from autofunc import tree
from autofunc.model import Model


def layer_costs(model: Model) -> dict[str, float]:
    """An estimate from shapes alone: for each layer, the elements of its weights with two or more dims.

    A matrix of n elements takes about 2n floating-point operations per row, whatever the layer does with it. A lookup in a
    table takes none, but shapes cannot tell a table from a matrix; so a first layer, which sees only the batch, counts as
    free. Tied weights count where they are used.
    """
    costs = dict.fromkeys(model.layers, 0.0)
    for path, leaf in model.spec.items():
        name = model.layer_of(path)
        if name is not None and leaf.dim() >= 2:
            costs[name] += leaf.numel()
    costs[next(iter(costs))] = 0.0
    return costs


def parameter_count(model: Model, paths: list[str] | None = None) -> int:
    """Number of distinct parameters (tied ones once), of all paths or of some."""
    chosen = {model.canonical(path) for path in (model.spec if paths is None else paths)}
    return sum(model.spec[path].numel() for path in sorted(chosen, key=tree.split_path))
