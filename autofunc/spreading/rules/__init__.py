"""Rules that replace operators whose operands are cut, or terms of a sum: one file per kind of operator."""

from autofunc.spreading.rules import attention, pointwise, products, reductions, views, vocabulary
from autofunc.spreading.rules.table import RULES, rule, rule_of

__all__ = ["RULES", "attention", "pointwise", "products", "reductions", "rule", "rule_of", "views", "vocabulary"]
