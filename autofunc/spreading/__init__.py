"""A graph of operators over the ranks of an axis: the layout of values, operators on parts, and what ranks exchange."""

from autofunc.spreading.axis import Axis, along, axis_named
from autofunc.spreading.layouts import FULL, TERMS, Cut, local_shape, piece_of, put_together
from autofunc.spreading.operation import Operation, Outcome, Want
from autofunc.spreading.plan import AxisPlan, settled
from autofunc.spreading.propagate import Propagation, Whole
from autofunc.spreading.rewrite import Rewriting
from autofunc.spreading.rules import rule
from autofunc.spreading.tables import DERIVED, SOURCES, wanted_cuts

__all__ = [
    "DERIVED", "FULL", "SOURCES", "TERMS", "Axis", "AxisPlan", "Cut", "Operation", "Outcome", "Propagation", "Rewriting",
    "Want", "Whole", "along", "axis_named", "local_shape", "piece_of", "put_together", "rule", "settled", "wanted_cuts",
]  # fmt: skip
