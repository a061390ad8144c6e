"""Reachability in a graph: ancestors, descendants, and the inputs that a region needs from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from operator import getitem

from torch import fx

from autofunc.graph.memory import base_of, is_view

Node = fx.Node


def reachable(roots: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Return the roots and every node reachable from them.

    Args:
        roots: where the search begins.
        step: returns a node's successors.
    """
    found: set[Node] = set()
    left = list(roots)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += step(node)
    return found


def ancestors(nodes: Iterable[Node], given: Iterable[Node] = ()) -> set[Node]:
    """Return nodes and all they read, directly or not, without `given` and whatever only those read."""
    stop = set(given)
    roots = (node for node in nodes if node not in stop)
    return reachable(roots, lambda node: [read for read in node.all_input_nodes if read not in stop])


def ancestors_within(nodes: Iterable[Node], region: Set[Node]) -> set[Node]:
    """Return the ancestors of nodes inside a region, themselves included, with all results of multi-output operators."""
    roots = (node for node in nodes if node in region)
    found = reachable(roots, lambda node: [read for read in node.all_input_nodes if read in region])
    return found | {node for node in region if node.target is getitem and node.args[0] in found}


def descendants(graph: fx.Graph, sources: Iterable[Node]) -> set[Node]:
    """Return all nodes that read one of the sources, directly or not, without the sources and the graph's output."""
    starts = set(sources)
    found = set(starts)
    for node in graph.nodes:
        if node.op != "output" and any(read in found for read in node.all_input_nodes):
            found.add(node)
    return found - starts


def frontier(targets: Iterable[Node], inside: Set[Node]) -> list[Node]:
    """Return the nodes a region needs from outside to compute its targets, in graph order.

    A view of a placeholder is recomputed inside, so that a parameter need not be kept. Other views are kept: they hold
    their base's memory and cost nothing more. Constants are available everywhere.

    Args:
        targets: nodes to compute; a target outside the region is itself needed.
        inside: the region.
    """

    def is_inside(node: Node) -> bool:
        return node in inside or (is_view(node) and base_of(node).op == "placeholder")

    seen = reachable(targets, lambda node: node.all_input_nodes if is_inside(node) else ())
    return sorted(node for node in seen if not is_inside(node) and node.op != "get_attr")  # nodes compare by position
