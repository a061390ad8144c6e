"""Embeddings get dense gradients: sums over microbatches, and exchanges between ranks, are of plain tensors."""

from __future__ import annotations

from torch import fx

from autofunc.graph.schema import arguments, is_operator

SPARSE = "gradients of its embeddings are dense despite sparse=True; an optimizer for sparse gradients is of no use"


def make_dense(graph: fx.Graph) -> bool:
    """Make every embedding's gradient dense, in place; return whether one would have been sparse."""
    found = False
    for node in graph.nodes:
        if is_operator(node) and "embedding" in str(node.target) and arguments(node).get("sparse"):
            given = arguments(node) | {"sparse": False}
            node.args, node.kwargs, found = (), given, True
    return found
