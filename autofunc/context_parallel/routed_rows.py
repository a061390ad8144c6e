"""Routed experts on cut tokens: each rank sends its own tokens to the experts, and has all of them.

Rows sorted by expert are therefore local to a rank, in an order of its own. They may go through products with experts and
through operators that treat rows separately, and back to their tokens. They are not a part of the rows that the whole would
have, so they cannot be gathered, or meet tokens in between. An expert's number of rows is a term of the whole's number.
"""

from __future__ import annotations

from torch import fx

from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.rules import rule
from autofunc.spreading import FULL, TERMS, Cut, Operation, Outcome, Want
from autofunc.spreading.operation import shape_of

Node = fx.Node

_SENT, _BROUGHT = "autofunc.to_experts", "autofunc.from_experts"


@rule(_SENT)
def sent(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Tokens (tokens, width) and their experts (tokens, k) become one row for each pair, sorted by expert."""
    x, chosen = op.given["x"], op.given["chosen"]
    cut = op.cut(x)
    if cut is None or cut.dim or op.layout(chosen) != cut:
        return None
    rows = Cut(0, tuple(part * shape_of(chosen)[1] for part in cut.parts))
    return op.becomes((rows, TERMS, rows, rows, TERMS), x=Want(x, cut), chosen=Want(chosen, cut))


@rule("autofunc.grouped_linear", "autofunc.grouped_matmul", linear=True)
def product(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Rows times their expert's matrix; where an expert's rows end is a term."""
    return _by_expert(op, "x", "weight")


@rule("autofunc.grouped_rows", linear=True)
def entries(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Each row's entry in a table by expert, such as a bias."""
    return _by_expert(op, "like", "table")


def _by_expert(op: Operation, rows: str, own: str) -> Outcome | None:
    """Combine cut rows with their experts' own values, which every rank has in full."""
    x, table, ends = op.given[rows], op.given[own], op.given["ends"]
    cut = op.cut(x)
    if cut is None or cut.dim or op.layout(table) is not FULL or op.layout(ends) is not TERMS:
        return None
    return op.becomes(cut, **{rows: Want(x, cut), own: Want(table, FULL), "ends": Want(ends, TERMS)})


@rule(_BROUGHT, linear=True)
def brought(op: Operation, axis: ContextAxis) -> Outcome | None:
    """Weighted sums of each token's rows."""
    made, weights, counts = (op.given[name] for name in ("made", "weights", "counts"))
    rows, cut = op.cut(made), op.cut(weights)
    if rows is None or cut is None or rows.dim or cut.dim:
        return None
    order, inverse = (Want(op.given[name], rows) for name in ("order", "inverse"))
    return op.becomes(
        cut, made=Want(made, rows), weights=Want(weights, cut), order=order, inverse=inverse, counts=Want(counts, TERMS)
    )


class RoutedRows:
    """The values of a graph that are rows sorted by expert."""

    def __init__(self) -> None:
        self._found: set[Node] = set()

    def note(self, node: Node, outcome: Outcome) -> bool:
        """Follow an operator; False if it would gather such rows, reduce them, or combine them with tokens."""
        name = str(getattr(node.target, "overloadpacket", ""))
        if name == _SENT:
            self._found.add(node)
        if name in (_SENT, _BROUGHT):
            return True
        rows = [want for want in outcome.wants if want.node in self._found]
        others = [want for want in outcome.wants if isinstance(want.layout, Cut) and want.node not in self._found]
        if rows and not isinstance(outcome.layout, Cut | tuple):
            return False
        if rows:
            self._found.add(node)
        return not rows or (not others and all(want.layout is not FULL for want in rows))

    def take_out(self, node: Node, source: Node, layout: object) -> None:
        """Follow one of several values that an operator makes."""
        if source in self._found and isinstance(layout, Cut):
            self._found.add(node)
