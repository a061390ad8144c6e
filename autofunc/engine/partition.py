"""Cut a captured stage into forward, backward, backward_input and backward_weight.

Two cuts: what forward keeps for the backward (F->I), and what the backward of the input keeps for that of the weights
(I->W). An operator with several outputs belongs to I whole: a norm's weight gradient comes with its input gradient.
Parameters are never kept.

Source of the idea: joint graph partitioning as in `torch._functorch.partitioners`, and the split of GraphPP (torchtitan,
`graph_pp/split_di_dw.py`); written anew because both work on module graphs of theirs.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import fx

from autofunc.decisions import is_check
from autofunc.engine.capture import Joint
from autofunc.graph.reach import ancestors, ancestors_within, descendants, frontier

Node = fx.Node


@dataclass(frozen=True)
class Piece:
    """A part of the joint graph: nodes that go in, nodes that come out, and gradients that it adds to accumulators."""

    params: list[int]  # numbers of the holders that go in first
    inputs: list[Node]  # all that goes in, those parameters first
    outputs: list[Node]
    adds: list[tuple[int, Node]]  # (number of the trainable holder, its gradient)
    checks: tuple[Node, ...] = ()  # that run with it, though nothing reads them


@dataclass(frozen=True)
class Pieces:
    """A stage, cut. Values kept between the pieces are lists of nodes; `batch` nodes among them cost nothing to keep."""

    forward: Piece  # takes all params, states, inputs, batch; gives outputs, new states, then `saved`
    evaluate: Piece  # the same, and gives no `saved`
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
    placeholders = [*joint.params, *joint.states, *joint.inputs, *joint.batch]
    outputs = joint.outputs
    behind = descendants(joint.graph, joint.cotangents)
    input_grads = [node for node in joint.input_grads if node is not None]
    adds = [(number, node) for number, node in enumerate(joint.weight_grads) if node is not None]
    unkept = {*joint.params, *joint.cotangents}

    everything = [*input_grads, *(node for _, node in adds)]
    saved = [node for node in frontier(everything, behind | again) if node not in unkept]
    backward = _piece(joint, [*saved, *joint.cotangents], input_grads, adds)
    everyone = list(range(len(joint.params)))
    checks = tuple(node for node in joint.graph.nodes if is_check(node))
    forward = Piece(everyone, placeholders, [*outputs, *joint.new_states, *saved], [], checks)
    evaluate = Piece(everyone, placeholders, [*outputs, *joint.new_states], [], checks)
    if not input_grads:
        return Pieces(forward, evaluate, saved, backward, None, [*saved, *joint.cotangents], backward)

    in_i = ancestors_within([*input_grads, *(node for number, node in adds if number in early)], behind)
    soon = [(number, node) for number, node in adds if node in in_i or node in joint.cotangents]
    late = [(number, node) for number, node in adds if (number, node) not in soon]
    # what is computed again is so in I, once; only what the batch alone gives is made once more in W
    of_batch = again - descendants(joint.graph, [*joint.params, *joint.states, *joint.inputs])
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


def in_order(piece: Piece, order: list[Node]) -> list[Node]:
    """All nodes that a piece computes, each made as late as its readers allow: what is computed again lives shortly.

    Args:
        piece: what to compute.
        order: all nodes of the joint graph, in order.
    """
    ends = {*piece.outputs, *(node for _, node in piece.adds), *piece.checks}
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
