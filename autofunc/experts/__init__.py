"""Routed experts: the tokens of each expert, products by groups of rows, and the way there and back."""

from autofunc.experts.products import PRODUCTS, grouped_linear, grouped_matmul, grouped_rows, product_work
from autofunc.experts.routed import (
    MEAN,
    Groups,
    from_experts,
    mean_over_expert_ranks,
    recorded_as_operators,
    routed_experts,
    run_for_real,
    to_experts,
)

__all__ = [
    "MEAN",
    "PRODUCTS",
    "Groups",
    "from_experts",
    "grouped_linear",
    "grouped_matmul",
    "grouped_rows",
    "mean_over_expert_ranks",
    "product_work",
    "recorded_as_operators",
    "routed_experts",
    "run_for_real",
    "to_experts",
]
