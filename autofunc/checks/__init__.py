"""Whether a module can be sharded and pipelined, and if not, why."""

from autofunc.checks.label_counts import weighed_alike_by
from autofunc.checks.report import Report
from autofunc.checks.run import check
from autofunc.checks.shifted_labels import shifted_by
from autofunc.checks.verdict import Verdict, Where

__all__ = ["Report", "Verdict", "Where", "check", "shifted_by", "weighed_alike_by"]
