"""Propagate layouts from parameters to every value of a graph: each operator once, in order."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import Tensor, fx

from autofunc.spreading.layouts import FULL, TERMS, Cut, Layout
from autofunc.spreading.operation import Borders, Operation, Outcome, Span, Undivided, shape_of
from autofunc.spreading.rules import rule_of

Node = fx.Node

SEQUENCE_DIM = 1
"""The dim of (rows, tokens, features) along which sequence parallelism cuts the stream between blocks."""


@dataclass(frozen=True, eq=False)
class Whole:
    """A forward with full sizes.

    Args:
        nodes: of the operators that are used, in order.
        weighted: parameters, and the nodes that depend on them; every rank computes all other values alike.
        params: node -> name of the parameter.
        kept: nodes that are returned, or are new state: every rank needs them whole.
        inputs: the tensors of the batch.
    """

    nodes: list[Node]
    weighted: Collection[Node]
    params: Mapping[Node, str]
    kept: Collection[Node]
    inputs: Collection[Node] = ()


class Propagation:
    """The layouts of a forward's values.

    Args:
        whole: the forward.
        cuts: parameter name -> its cut.
        size: number of ranks along the axis.
        axis: its name.
        sequence: True to cut sums of terms along the tokens, if they have any.
    """

    def __init__(self, whole: Whole, cuts: Mapping[str, Cut], size: int, axis: str, *, sequence: bool = False) -> None:
        self.whole, self.size, self.axis, self._sequence = whole, size, axis, sequence
        self.layouts: dict[Node, Any] = {}  # a `Layout`, or several
        self.outcomes: dict[Node, Outcome] = {}  # of operators whose operands are not all full
        self.added: dict[Node, Layout] = {}  # terms that are summed -> layout of the sum
        self.made_full: dict[Node, None] = {}  # operators without a rule for parts: their operands are made full
        self.borders: dict[str, set[int]] = {}  # of parameters: offsets at which parts must begin
        self.undivided: dict[str, tuple[int, Node]] = {}  # uncut parameters: what does not divide, and where
        self._spans: dict[Node, frozenset[Span]] = {}
        for node, name in whole.params.items():
            if name in cuts:
                self.layouts[node], self._spans[node] = cuts[name], frozenset([Span(name, 0, cuts[name].whole)])

    def run(self, nodes: Iterable[Node] | None = None) -> Propagation:
        """Visit operators in order, by default all of them."""
        for node in self.whole.nodes if nodes is None else nodes:
            if node in self.whole.weighted:
                self.visit(node)
        return self

    def layout(self, node: Node) -> Any:
        """Return the layout of a value; a tuple for an operator with several results."""
        return self.layouts.get(node, FULL)

    def spans(self, node: Node) -> frozenset[Span]:
        """Return the spans of parameters that the cut dim of a value was computed from."""
        return self._spans.get(node, frozenset())

    def visit(self, node: Node) -> None:
        """Visit an operator, after those whose results it reads."""
        if node.target is getitem and isinstance(node.args[0], Node):
            several = self.layouts.get(node.args[0])
            if isinstance(several, tuple):
                self.layouts[node] = several[node.args[1]]  # type: ignore[index]
                self._spans[node] = self._narrowed(node.args[0], node.args[1])  # type: ignore[arg-type]
            return
        if all(self.layout(each) is FULL for each in node.all_input_nodes):
            return
        found = self._outcome(node)
        if found is None:
            self.made_full[node] = None
            for each in node.all_input_nodes:
                if self.layout(each) is TERMS:
                    self._add_up(each)
            return
        wanted = [want.node for want in found.wants if isinstance(want.layout, Cut) and self.layout(want.node) is not TERMS]
        self.outcomes[node], self.layouts[node] = found, found.layout
        self._spans[node] = frozenset[Span]().union(*(self.spans(each) for each in wanted))
        if not isinstance(found.layout, tuple):
            self._spans[node] = self._narrowed(node, 0)

    def _narrowed(self, node: Node, place: int) -> frozenset[Span]:
        """Return the spans of one of an operator's results, which may be a part of its operand."""
        found, outcome = self.spans(node), self.outcomes[node]
        if not outcome.ranges:
            return found
        whole = next(want.layout.whole for want in outcome.wants if isinstance(want.layout, Cut))
        return frozenset(span.within(*outcome.ranges[place], whole) for span in found)

    def _outcome(self, node: Node) -> Outcome | None:
        terms = [each for each in node.all_input_nodes if self.layout(each) is TERMS]
        if terms and all(len(each.users) == 1 for each in terms):
            linear = rule_of(node, linear=True)
            found = linear(Operation(node, self.layouts, self.size, self.axis)) if linear is not None else None
            if found is not None:
                return found
        seen = {
            **{each: self.layout(each) for each in node.all_input_nodes},
            **{each: self._add_up(each) for each in terms},
        }
        if all(layout is FULL for layout in seen.values()):
            return None
        rule = rule_of(node)
        try:
            seen_from = ChainMap(seen, self.layouts)
            found = rule(Operation(node, seen_from, self.size, self.axis)) if rule is not None else None
            return None if found is not None and self._scatters_tokens(found) else found
        except Borders as needed:
            self._need(needed)
        except Undivided as needed:
            if not self._takes_apart(node, needed.node):
                for span in self.spans(needed.node):
                    self.undivided.setdefault(span.name, (needed.number, node))
        return None

    def _takes_apart(self, node: Node, x: Node) -> bool:
        """Return whether a view splits a value into its parts, like queries, keys and values, rather than into heads; note
        where the parts begin. The operators that follow select parts one at a time; heads stay together up to a product.
        """
        alone = Propagation(self.whole, {}, 1, self.axis)
        alone.layouts[x], alone._spans[x] = Cut(self.layout(x).dim, (self.layout(x).whole,)), self.spans(x)
        waiting = [node]
        while waiting:
            each = waiting.pop()
            alone.visit(each)
            if isinstance(alone.layout(each), (Cut, tuple)):
                waiting += [user for user in each.users if user in self.whole.weighted and len(user.all_input_nodes) == 1]
        own = {name: self.layouts[param].borders for param, name in self.whole.params.items() if name in alone.borders}
        more = {name: places - {*own[name]} for name, places in alone.borders.items()}
        for name, places in more.items():
            self.borders.setdefault(name, set()).update(places)
        return any(more.values())

    def _scatters_tokens(self, outcome: Outcome) -> bool:
        """True if ranks would get some tokens of each row while one dim holds all rows' tokens: what follows needs all."""
        of_weights = any(self.spans(want.node) for want in outcome.wants)
        return isinstance(outcome.layout, Cut) and len(outcome.layout.parts) > 1 and not of_weights

    def _need(self, needed: Borders) -> None:
        layout = self.layout(needed.node)
        assert isinstance(layout, Cut)
        for name, start, size in self.spans(needed.node):
            places = {start + size * place // layout.whole for place in needed.places if size * place % layout.whole == 0}
            self.borders.setdefault(name, set()).update(places)

    def _add_up(self, node: Node) -> Layout:
        """Return the layout of a sum of which ranks have terms."""
        if node not in self.added:
            shape = shape_of(node)
            tokens = Cut(SEQUENCE_DIM, (shape[SEQUENCE_DIM],)) if self._sequence and len(shape) == 3 else None
            self.added[node] = tokens if tokens is not None and tokens.fits(self.size) else FULL
        return self.added[node]


def is_differentiable(node: Node) -> bool:
    """True if a value, or one of several, can have a gradient."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex()) for part in parts)
