"""Splitting a model at its split points into pure stage functions."""

from autofunc.splitting.boundary import Boundaries, Boundary, Returned, Value, describe, outline
from autofunc.splitting.context import Ready, StageContext, accumulator_dtype
from autofunc.splitting.cost import LayerCost, count_operations, imbalance, layer_costs, parameter_count
from autofunc.splitting.cut import check_whole, split
from autofunc.splitting.infer import follow, infer, infer_boundaries, parameter_dtypes
from autofunc.splitting.measure import measure_layer, measure_layers
from autofunc.splitting.outside import NothingTrainedOutside
from autofunc.splitting.setting import ALONE, WHOLE, Partitioning, Precision, Setting
from autofunc.splitting.stage import Stage

__all__ = [
    "ALONE",
    "WHOLE",
    "Boundaries",
    "Boundary",
    "LayerCost",
    "NothingTrainedOutside",
    "Partitioning",
    "Precision",
    "Ready",
    "Returned",
    "Setting",
    "Stage",
    "StageContext",
    "Value",
    "accumulator_dtype",
    "check_whole",
    "count_operations",
    "describe",
    "follow",
    "imbalance",
    "infer",
    "infer_boundaries",
    "layer_costs",
    "measure_layer",
    "measure_layers",
    "outline",
    "parameter_count",
    "parameter_dtypes",
    "split",
]
