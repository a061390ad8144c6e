"""Splitting: from a model and its split points to stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autofunc.errors import SplitError, one_of
from autofunc.model import Model
from autofunc.splitting.balance import balance
from autofunc.splitting.cost import layer_costs
from autofunc.splitting.points import resolve_points
from autofunc.splitting.stage import Stage


def split(
    model: Model,
    split_points: Sequence[str] | int | str = (),
    *,
    num_stages: int | None = None,
    costs: Mapping[str, float] | None = None,
) -> list[Stage]:
    """Split a model into pure stages.

    Args:
        model: the model to split.
        split_points: names or globs of the layers at which a new stage begins (`["h.4", "h.8"]` gives three stages), or a
            number of stages, or "auto" with `num_stages`: the best contiguous partition by cost.
        num_stages: number of stages for "auto".
        costs: cost of each layer, by name, for a number or "auto"; estimated from shapes by default.

    Returns:
        All stages of the model, in order, for `af.pipeline`. They hold no parameters.

    Raises:
        SplitError: for points at which the model cannot be cut.

    Example:
        >>> import autofunc as af
        >>> model = af.Model({name: af.Layer(apply=lambda p, x, batch: x) for name in ("a", "b", "c")})
        >>> af.split(model, ["b"])
        [Stage(0: a .. a), Stage(1: b .. c)]
    """
    if isinstance(split_points, str):
        if split_points != "auto":
            raise SplitError(f'split_points={split_points!r}: expected a list of names, a number of stages, or "auto"')
        if num_stages is None:
            raise SplitError('split_points="auto" needs num_stages=')
        split_points = num_stages
    elif num_stages is not None:
        raise SplitError(f'num_stages={num_stages} goes with split_points="auto" only')
    if isinstance(split_points, int):
        model, starts = _balanced(model, split_points, costs)
        names = list(model.layers)
    else:
        places = model.specialise().cut_points
        points = resolve_points(places, split_points)
        model = model.cut_before(points)
        names, start = list(model.layers), places.start
        starts = [_layer_at(names, start, start[point]) for point in points]
    bounds = zip([0, *starts], [*starts, len(names)], strict=True)
    return [Stage(model, index, tuple(names[begin:end])) for index, (begin, end) in enumerate(bounds)]


LOPSIDED = 1.5
"""How much costlier than the mean the costliest stage may be before stages may also begin inside layers."""


def _balanced(model: Model, num_stages: int, costs: Mapping[str, float] | None) -> tuple[Model, list[int]]:
    """Cut layers into stages by cost; if they are too few or too uneven, consider every place where the model can be cut.

    Returns:
        The model with its layers, and the positions of the layers at which the stages after the first begin.
    """
    if costs is not None:
        missing = [name for name in model.layers if name not in costs]
        if missing:
            raise SplitError(f"costs have no {missing[0]!r}; {one_of(missing[0], costs)}")
        return model, balance([costs[name] for name in model.layers], num_stages)
    by_layer = layer_costs(model)
    if num_stages <= len(model.layers):
        starts = balance(list(by_layer.values()), num_stages)
        longest = _longest(list(by_layer.values()), starts)
        if longest * num_stages <= LOPSIDED * sum(by_layer.values()):
            return model, starts
    places = model.specialise().cut_points
    finer = model.cut_before(list(places.start))
    if num_stages > len(finer.layers):
        refused = "; ".join(f"{name!r} {why}" for name, why in list(places.refused.items())[:4])
        raise SplitError(
            f"{model.title} can be cut into {len(finer.layers)} stages at most, not {num_stages}; they may begin at "
            f"{', '.join(finer.layers)}" + (f". Refused: {refused}" if refused else "")
        )
    costs = layer_costs(finer) if finer is not model else by_layer
    ends = balance(list(costs.values()), num_stages)
    if num_stages <= len(model.layers) and _longest(list(costs.values()), ends) >= longest:
        return model, starts
    return finer, ends


def _longest(costs: Sequence[float], starts: Sequence[int]) -> float:
    return max(sum(costs[begin:end]) for begin, end in zip([0, *starts], [*starts, len(costs)], strict=True))


def _layer_at(names: Sequence[str], start: Mapping[str, int], position: int) -> int:
    """Return the number of the layer that begins at a position."""
    return next(number for number, name in enumerate(names) if start.get(name) == position)


def check_whole(stages: Sequence[Stage]) -> None:
    """Refuse stages that are not all the stages of one model, in order.

    Raises:
        SplitError: if they are not.
    """
    model = stages[0].model
    layers = [name for stage in stages for name in stage.layers]
    ordered = all(stage.index == index and stage.model is model for index, stage in enumerate(stages))
    if not ordered or layers != list(model.layers):
        raise SplitError(
            f"the stages run the layers {', '.join(layers)}, but the model has {', '.join(model.layers)}; pass all that "
            "one call of af.split returned, in order"
        )
