"""What leads to what in a graph: ancestors, descendants, and what a part of it needs from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from operator import getitem

from torch import fx

from autofunc.graph.memory import base_of, is_view

Node = fx.Node


def reachable(roots: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """The roots, and all that steps lead to from there.

    Args:
        roots: where it begins.
        step: from a node to the next ones.
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
    """These and all that they read, directly or not, but for what is given and what only that reads."""
    stop = set(given)
    roots = (node for node in nodes if node not in stop)
    return reachable(roots, lambda node: [read for read in node.all_input_nodes if read not in stop])


def ancestors_within(nodes: Iterable[Node], region: Set[Node]) -> set[Node]:
    """What leads to these inside a region, themselves included; an operator with several results belongs to it whole."""
    roots = (node for node in nodes if node in region)
    found = reachable(roots, lambda node: [read for read in node.all_input_nodes if read in region])
    return found | {node for node in region if node.target is getitem and node.args[0] in found}


def descendants(graph: fx.Graph, sources: Iterable[Node]) -> set[Node]:
    """All nodes that read one of these, directly or not; they themselves and the graph's output are left out."""
    starts = set(sources)
    found = set(starts)
    for node in graph.nodes:
        if node.op != "output" and any(read in found for read in node.all_input_nodes):
            found.add(node)
    return found - starts


def frontier(targets: Iterable[Node], inside: Set[Node]) -> list[Node]:
    """What a region needs from outside to compute its targets, in the order of the graph.

    A view of a placeholder is made again inside, so that a parameter need not be kept. Other views are kept as they are:
    they hold the memory of what they are views of and cost nothing more. Constants are at hand everywhere.

    Args:
        targets: what is computed; what of it lies outside the region is needed itself.
        inside: the region.
    """

    def is_inside(node: Node) -> bool:
        return node in inside or (is_view(node) and base_of(node).op == "placeholder")

    seen = reachable(targets, lambda node: node.all_input_nodes if is_inside(node) else ())
    return sorted(node for node in seen if not is_inside(node) and node.op != "get_attr")  # nodes compare by their place
