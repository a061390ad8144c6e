"""Whether a module can be sharded and pipelined, and if not, why."""

from autofunc.checks.loss import shifted_by
from autofunc.checks.report import Report
from autofunc.checks.run import check
from autofunc.checks.verdict import Verdict, Where

__all__ = ["Report", "Verdict", "Where", "check", "shifted_by"]
