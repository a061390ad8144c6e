"""Cut a captured stage into forward, backward, backward_input and backward_weight.

Two cuts: what forward keeps for the backward (F->I), and what the backward of the input keeps for that of the weights
(I->W). An operator with several outputs belongs to I whole: a norm's weight gradient comes with its input gradient.
Parameters are never kept.

Source of the idea: joint graph partitioning as in `torch._functorch.partitioners`, and the split of GraphPP (torchtitan,
`graph_pp/split_di_dw.py`); written anew because both work on module graphs of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from operator import getitem

from torch import fx

from autofunc.engine.capture import Joint
from autofunc.engine.views import base_of, is_view

Node = fx.Node


@dataclass(frozen=True)
class Piece:
    """A part of the joint graph: nodes that go in, nodes that come out, and gradients that it adds to accumulators."""

    params: list[int]  # numbers of the holders that go in first
    inputs: list[Node]  # all that goes in, those parameters first
    outputs: list[Node]
    adds: list[tuple[int, Node]]  # (number of the trainable holder, its gradient)


@dataclass(frozen=True)
class Pieces:
    """A stage, cut. Values kept between the pieces are lists of nodes; `batch` nodes among them cost nothing to keep."""

    forward: Piece  # takes all params, inputs, batch; gives outputs, then `saved`
    evaluate: Piece  # the same without `saved`
    saved: list[Node]  # what F keeps: no parameters
    backward: Piece  # takes saved, cotangents; gives input gradients
    backward_input: Piece | None  # the same, and gives `kept` after the input gradients; None where there are none
    kept: list[Node]  # what I keeps for W: no parameters
    backward_weight: Piece  # takes `kept`; where there is no I, what `backward` takes


def partition(joint: Joint, again: Set[Node] = frozenset(), early: Set[int] = frozenset()) -> Pieces:
    """Cut a joint graph.

    Args:
        joint: the captured stage.
        again: nodes of the forward that are computed again in the backward instead of kept.
        early: numbers of the trainable holders whose gradients are computed in I.
    """
    placeholders = [*joint.params, *joint.inputs, *joint.batch]
    outputs = joint.outputs
    behind = depends_on(joint.graph, joint.cotangents)
    input_grads = [node for node in joint.input_grads if node is not None]
    adds = [(number, node) for number, node in enumerate(joint.weight_grads) if node is not None]
    unkept = {*joint.params, *joint.cotangents}

    everything = [*input_grads, *(node for _, node in adds)]
    saved = [node for node in frontier(everything, behind | again) if node not in unkept]
    backward = _piece(joint, [*saved, *joint.cotangents], input_grads, adds)
    everyone = list(range(len(joint.params)))
    forward = Piece(everyone, placeholders, [*outputs, *saved], [])
    evaluate = Piece(everyone, placeholders, outputs, [])
    if not input_grads:
        return Pieces(forward, evaluate, saved, backward, None, [*saved, *joint.cotangents], backward)

    in_i = ancestors([*input_grads, *(node for number, node in adds if number in early)]) & behind
    in_i |= {node for node in behind if node.target is getitem and node.args[0] in in_i}
    soon = [(number, node) for number, node in adds if node in in_i or node in joint.cotangents]
    late = [(number, node) for number, node in adds if (number, node) not in soon]
    # what is computed again is so in I, once; only what the batch alone gives is made once more in W
    of_batch = again - depends_on(joint.graph, [*joint.params, *joint.inputs])
    inside = (behind - in_i) | of_batch
    kept = [node for node in frontier([node for _, node in late], inside) if node not in joint.params]
    return Pieces(
        forward,
        evaluate,
        saved,
        backward,
        _piece(joint, [*saved, *joint.cotangents], [*input_grads, *kept], soon),
        kept,
        _piece(joint, kept, [], late),
    )


def _piece(joint: Joint, given: list[Node], outputs: list[Node], adds: list[tuple[int, Node]]) -> Piece:
    """A piece that takes what is given and the parameters that it needs beside."""
    needed = ancestors([*outputs, *(node for _, node in adds)], given)
    params = [number for number, node in enumerate(joint.params) if node in needed]
    return Piece(params, [*(joint.params[number] for number in params), *given], outputs, adds)


def depends_on(graph: fx.Graph, sources: Iterable[Node]) -> set[Node]:
    """All nodes that read one of these, directly or not."""
    found = set(sources)
    for node in graph.nodes:
        if node.op != "output" and any(read in found for read in node.all_input_nodes):
            found.add(node)
    return found - set(sources)


def ancestors(nodes: Iterable[Node], given: Iterable[Node] = ()) -> set[Node]:
    """These and all that they read, directly or not, but for what is given and what only that reads."""
    found: set[Node] = set()
    stop, left = set(given), list(nodes)
    while left:
        node = left.pop()
        if node not in found and node not in stop:
            found.add(node)
            left += node.all_input_nodes
    return found


def frontier(targets: Iterable[Node], inside: Set[Node]) -> list[Node]:
    """What a region needs from outside to compute its targets.

    A view of a parameter is made again inside, so that the parameter need not be kept; other views are kept as they are,
    for they hold the memory of what they are views of and cost nothing more.
    """
    needed: dict[Node, None] = {}
    seen: set[Node] = set()
    left = list(targets)
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inside or (is_view(node) and base_of(node).op == "placeholder"):
            left += node.all_input_nodes
        elif node.op != "get_attr":
            needed[node] = None
    return sorted(needed)  # nodes compare by their place in the graph


def in_order(piece: Piece, order: list[Node]) -> list[Node]:
    """All nodes that a piece computes, each made as late as its readers allow: what is computed again lives shortly.

    Args:
        piece: what to compute.
        order: all nodes of the joint graph, in order.
    """
    ends = {*piece.outputs, *(node for _, node in piece.adds)}
    needed = ancestors(ends, piece.inputs)
    place = {node: number for number, node in enumerate(order) if node in needed}
    made: dict[Node, None] = {}
    for end in (node for node in place if node in ends):
        stack = [end]
        while stack:
            missing = [read for read in stack[-1].all_input_nodes if read in place and read not in made]
            if missing:
                stack.append(max(missing, key=place.__getitem__))
            else:
                made.setdefault(stack.pop())
    return list(made)
