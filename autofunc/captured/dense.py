"""Gradients of embeddings are dense: sums of microbatches, and what ranks exchange, are plain tensors."""

from __future__ import annotations

from torch import fx

from autofunc.graph.schema import arguments, is_operator

SPARSE = "gradients of its embeddings are dense, whatever sparse=True says; an optimizer for sparse ones is of no use"


def make_dense(graph: fx.Graph) -> bool:
    """Ask every embedding for a dense gradient, in place; whether one would have had a sparse one."""
    found = False
    for node in graph.nodes:
        if is_operator(node) and "embedding" in str(node.target) and arguments(node).get("sparse"):
            given = arguments(node) | {"sparse": False}
            node.args, node.kwargs, found = (), given, True
    return found
