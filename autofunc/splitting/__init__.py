"""Splitting a model at its split points into pure stage functions."""

from autofunc.splitting.boundary import Boundaries, Boundary, Value, infer_boundaries, parameter_dtypes
from autofunc.splitting.cost import layer_costs, parameter_count
from autofunc.splitting.cut import check_whole, split
from autofunc.splitting.setting import ALONE, WHOLE, Partitioning, Precision, Setting
from autofunc.splitting.stage import Stage

__all__ = [
    "ALONE",
    "WHOLE",
    "Boundaries",
    "Boundary",
    "Partitioning",
    "Precision",
    "Setting",
    "Stage",
    "Value",
    "check_whole",
    "infer_boundaries",
    "layer_costs",
    "parameter_count",
    "parameter_dtypes",
    "split",
]
