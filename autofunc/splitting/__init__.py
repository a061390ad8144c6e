"""Splitting a model at its split points into pure stage functions."""

from autofunc.splitting.boundary import Boundaries, Boundary, Value, infer_boundaries, parameter_dtypes
from autofunc.splitting.cost import count_operations, imbalance, layer_costs, parameter_count
from autofunc.splitting.cut import check_whole, split
from autofunc.splitting.measure import measure_layers
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
    "count_operations",
    "imbalance",
    "infer_boundaries",
    "layer_costs",
    "measure_layers",
    "parameter_count",
    "parameter_dtypes",
    "split",
]
