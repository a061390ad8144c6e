"""Whether a module can be sharded and pipelined, and if not, why."""

from autofunc.checks.report import Report, Verdict, Where
from autofunc.checks.run import check
from autofunc.checks.text import table

__all__ = ["Report", "Verdict", "Where", "check", "table"]
