"""Splitting a model at its split points into pure stage functions."""

from autofunc.split.boundary import Boundaries, Boundary, Value, infer_boundaries
from autofunc.split.cost import layer_costs, parameter_count
from autofunc.split.cut import split
from autofunc.split.stage import Stage

__all__ = [
    "Boundaries",
    "Boundary",
    "Stage",
    "Value",
    "infer_boundaries",
    "layer_costs",
    "parameter_count",
    "split",
]
