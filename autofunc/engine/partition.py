"""Cut a captured stage into forward, backward, backward_input and backward_weight.

Two cuts: what the forward keeps for the backward (F->I), and what the input gradient keeps for the weight gradients
(I->W). An operator with several outputs goes to `I` as a whole: a norm's weight gradient comes with its input gradient.
Parameters are never kept.

Source of the idea: joint graph partitioning as in `torch._functorch.partitioners`, and the split of GraphPP (torchtitan,
`graph_pp/split_di_dw.py`); reimplemented, because both expect their own kind of module graphs.
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
    """A part of the joint graph: input nodes, output nodes, and gradients that it adds to accumulators."""

    params: list[int]  # indices of the holders that it takes first
    inputs: list[Node]  # all inputs, those parameters first
    outputs: list[Node]
    adds: list[tuple[int, Node]]  # (index of the trainable holder, its gradient)
    checks: tuple[Node, ...] = ()  # run with it, though nothing reads them


@dataclass(frozen=True)
class Pieces:
    """A partitioned stage. Values kept between the pieces are lists of nodes; `batch` nodes among them are free to keep."""

    forward: Piece  # takes all params, states, inputs, batch; returns outputs, new states, then `saved`
    evaluate: Piece  # the same, without `saved`
    saved: list[Node]  # what F keeps: no parameters
    backward: Piece  # takes saved, cotangents; returns input gradients
    backward_input: Piece | None  # the same, then returns `kept`; None if there are no input gradients
    kept: list[Node]  # what I keeps for W: no parameters
    backward_weight: Piece  # takes `kept`; without an I, what `backward` takes


def partition(joint: Joint, again: Set[Node] = frozenset(), early: Set[int] = frozenset()) -> Pieces:
    """Partition a joint graph.

    Args:
        joint: the captured stage.
        again: nodes of the forward that the backward recomputes instead of keeping them.
        early: indices of the trainable holders whose gradients are computed in `I`.
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
    # recomputation happens once, in I; only what depends on the batch alone is recomputed in W too
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
    """Make a piece that takes the given nodes, and the parameters it needs besides."""
    needed = ancestors([*outputs, *(node for _, node in adds)], given)
    params = [number for number, node in enumerate(joint.params) if node in needed]
    return Piece(params, [*(joint.params[number] for number in params), *given], outputs, adds)


def in_order(piece: Piece, order: list[Node]) -> list[Node]:
    """List all nodes that a piece computes, each as late as its readers allow, so that recomputed values are short-lived.

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
