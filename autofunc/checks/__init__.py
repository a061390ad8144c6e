"""Check whether a module can be sharded and pipelined, and if not, why."""

from autofunc.checks.label_counts import weighting_warning
from autofunc.checks.report import Report
from autofunc.checks.run import check
from autofunc.checks.shifted_labels import shift_warning
from autofunc.checks.verdict import Verdict, Where

__all__ = ["Report", "Verdict", "Where", "check", "shift_warning", "weighting_warning"]
