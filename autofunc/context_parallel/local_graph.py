"""The rewriting of a whole graph into the one that each cp rank runs on its tokens: the same graph on every rank.

Values that depend on the batch alone are computed for all tokens, and cut where they meet cut values; so positions, masks
and shifted labels know nothing of chunks. Tokens are first cut where entries of the batch are looked up or projected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import fx

from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.moves import added_up, all_tokens, on_first, own_tokens
from autofunc.context_parallel.routed_rows import RoutedRows
from autofunc.context_parallel.rules import PRODUCTS, by_rule
from autofunc.context_parallel.token_chunks import check_length
from autofunc.context_parallel.token_dims import of_operator
from autofunc.context_parallel.traced import Traced
from autofunc.errors import ModelError
from autofunc.experts import run_for_real
from autofunc.graph.schema import is_mutable, is_operator, is_pointwise
from autofunc.spreading import FULL, TERMS, Cut, Outcome, Want
from autofunc.spreading.layouts import Layout, local_shape
from autofunc.spreading.operation import Borders, Undivided, shape_of
from autofunc.spreading.rules.views import viewed

Node = fx.Node

_aten = torch.ops.aten
_LOOKED_UP, _PROJECTED = {_aten.embedding}, {_aten.linear, _aten.matmul}
_VIEWS = {_aten.view, _aten.reshape, _aten._unsafe_view}
_CONVERSIONS = {_aten.to, _aten._to_copy}


class LocalGraph:
    """A graph on one rank's tokens.

    Args:
        whole: the graph to cut.
        received: layouts of received values.
        entries: layouts that entries would have if they were cut.
        axis: the ranks.
        what: a name for messages.

    Attributes:
        graph: the new graph; its placeholders are those of the whole, followed by `pieces`.
        pieces: (entry, how it is cut) -> placeholder, for entries of which only this rank's tokens are wanted.
        returned: for each returned leaf, its node or the constant.
        after: for each state, the node of its new value, the same on every rank.
        layouts: of the returned tensors, by position.

    Raises:
        ModelError: for an operator that mixes tokens in a way no rule allows.
        BatchError: for a sequence that does not divide into equal chunks.
    """

    def __init__(
        self, whole: Traced, received: Mapping[Node, Layout], entries: Mapping[str, Layout], axis: ContextAxis, what: str
    ) -> None:  # fmt: skip
        self._whole, self._axis, self._what = whole, axis, what
        self._layouts: dict[Node, Any] = {node: layout for node, layout in received.items() if layout is not FULL}
        self._weighted = {*whole.params.values(), *whole.received, *whole.states.values()}
        self._made: dict[tuple[Node, Any], Node] = {}
        self._routed = RoutedRows()
        self._names = {node: name for name, node in whole.entries.items()}
        self._natural: dict[Node, Layout] = {node: entries.get(name, FULL) for name, node in whole.entries.items()}
        self._is_pure = not any(map(is_mutable, whole.module.graph.nodes))
        self.graph, self.pieces = fx.Graph(), dict[tuple[str, Cut], Node]()
        for node in whole.module.graph.nodes:
            if node.op == "output":
                break
            self._at = node
            if node.op == "placeholder":
                self._made[node, self._layout(node)] = self._last_placeholder = self._copy(node)
            elif node.op == "get_attr":
                self._made[node, FULL] = self._copy(node)
            else:
                self._visit(node)
        run_for_real(self.graph)
        self.returned = [
            self._made[each, self._layout(each)] if isinstance(each, Node) else each for each in whole.returned
        ]  # fmt: skip
        self.after = [self._obtain(each, FULL) for each in whole.after]
        self.layouts = {place: self._layout(each) for place, each in enumerate(whole.returned) if isinstance(each, Node)}

    def terms(self, place: int) -> Node:
        """Return a returned leaf as a term of a sum over ranks."""
        node = self._whole.returned[place]
        layout = self._layout(node)
        if layout is TERMS:
            return self._made[node, TERMS]
        return self.graph.call_function(on_first, (self._obtain(node, FULL), self._axis.ranks))

    def full(self, place: int) -> Node:
        """Return a returned leaf in full, the same on every rank."""
        return self._obtain(self._whole.returned[place], FULL)

    # --- one operator

    def _layout(self, node: Any) -> Any:
        return self._layouts.get(node, FULL)

    def _copy(self, node: Node) -> Node:
        new = self.graph.node_copy(node, lambda each: self._obtain(each, FULL))
        new.meta = dict(node.meta)
        return new

    def _visit(self, node: Node) -> None:
        if node.target is getitem and isinstance(self._layouts.get(node.args[0]), tuple):  # type: ignore[arg-type]
            source: Any = node.args[0]
            self._layouts[node] = layout = self._layouts[source][node.args[1]]
            self._routed.take_out(node, source, layout)
            new = self.graph.call_function(getitem, (self._made[source, self._layouts[source]], node.args[1]))
            self._keep(node, new)
            return
        if any(each in self._weighted for each in node.all_input_nodes):
            self._weighted.add(node)
        else:
            self._natural[node] = of_operator(node, self._natural, self._axis)
        seen = {each: self._layout(each) for each in node.all_input_nodes}
        if all(layout is FULL for layout in seen.values()):
            seen = self._seed(node) or seen
        if all(layout is FULL for layout in seen.values()):
            self._keep(node, self._copy(node))
            return
        outcome = self._outcome(node, seen)
        self._check(node, outcome)
        self._layouts[node] = outcome.layout
        kwargs = {name: self._argument(each) for name, each in outcome.kwargs.items()}
        self._keep(node, self._call(outcome.target, self._argument(outcome.args), kwargs))

    def _keep(self, node: Node, new: Node) -> None:
        self._made[node, self._layout(node)] = new

    def _outcome(self, node: Node, seen: dict[Node, Any]) -> Outcome:
        """Return what becomes of an operator with operands that are not full.

        Raises:
            ModelError: when no rule applies.
        """
        terms = [each for each, layout in seen.items() if layout is TERMS]
        found = by_rule(node, seen, self._axis, linear=True) if terms else None
        if found is not None:
            return found
        seen = {**seen, **dict.fromkeys(terms, FULL)}
        if all(layout is FULL for layout in seen.values()):
            return Outcome(FULL, node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        found = by_rule(node, seen, self._axis)
        if found is None or is_mutable(node):
            raise self._refused(node)
        return found

    def _check(self, node: Node, outcome: Outcome) -> None:
        """Refuse an operator that would gather tokens except for attention, or cut them other than into chunks."""
        for want in outcome.wants:
            own = self._layout(want.node)
            if isinstance(own, Cut) and want.layout != own and not (want.layout is FULL and _packet(node) in PRODUCTS):
                raise self._refused(node)
        layouts = outcome.layout if isinstance(outcome.layout, tuple) else (outcome.layout,)
        for layout in (*layouts, *(want.layout for want in outcome.wants)):
            if isinstance(layout, Cut) and not layout.fits(2 * self._axis.size):
                raise self._refused(node)
        if not self._routed.note(node, outcome):
            raise self._refused(node)

    def _refused(self, node: Node) -> ModelError:
        line = self._whole.line_of(node)
        where = f" ({line})" if line else ""
        return ModelError(
            f"{self._what} runs {_title(node)}{where} on tokens that are cut over cp={self._axis.size} ranks, and a rank "
            "would need tokens of other ranks: only attention, reductions and losses may mix tokens; use cp=1"
        )

    # --- where tokens are first cut

    def _seed(self, node: Node) -> dict[Node, Any] | None:
        """Return the operands' layouts for an operator that looks up or projects entries of the batch; else None."""
        packet = _packet(node)
        if node not in self._weighted or packet not in _LOOKED_UP | _PROJECTED:
            return None
        source = node.args[1 if packet in _LOOKED_UP else 0]
        cut = self._natural.get(source, FULL) if source not in self._weighted else FULL  # type: ignore[arg-type]
        dims = len(shape_of(source))
        if not isinstance(cut, Cut) or dims < 2 or (packet in _PROJECTED and (dims < 3 or cut.dim > dims - 2)):
            return None
        check_length(cut.parts[0], self._axis.size, f"{self._what}: its sequence")
        return {**dict.fromkeys(node.all_input_nodes, FULL), source: cut}  # type: ignore[dict-item]

    # --- values in the layouts in which they are wanted

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Want):
            return self._obtain(argument.node, argument.layout)
        if isinstance(argument, Node):
            return self._obtain(argument, FULL)
        if not isinstance(argument, (list, tuple)):  # a graph's lists have their own class
            return argument
        return tuple(map(self._argument, argument)) if isinstance(argument, tuple) else list(map(self._argument, argument))

    def _obtain(self, node: Node, layout: Layout) -> Node:
        own = self._layout(node)
        if isinstance(own, tuple):
            layout = own  # type: ignore[assignment]  # several values, taken out one at a time
        if (node, layout) not in self._made:
            self._made[node, layout] = self._moved(node, own, layout)
        return self._made[node, layout]

    def _moved(self, node: Node, own: Layout, layout: Layout) -> Node:
        ranks = self._axis.ranks
        if isinstance(layout, Cut):
            if own is FULL and node not in self._weighted:
                return self._piece(node, layout)
            return self._call(own_tokens, (self._obtain(node, FULL), layout.dim, layout.parts, ranks), {})
        if isinstance(own, Cut):
            return self._call(all_tokens, (self._made[node, own], own.dim, own.parts, ranks), {})
        return self._call(added_up, (self._made[node, own], ranks), {})

    def _piece(self, node: Node, cut: Cut) -> Node:
        """Cut a value that depends on the batch alone, as early as possible, so that little is computed for other ranks."""
        if node in self._names:
            with self.graph.inserting_after(self._last_placeholder):
                made = self._last_placeholder = self.graph.placeholder(f"piece_{len(self.pieces)}")
            self.pieces[self._names[node], cut] = made
            return made
        packet = _packet(node)
        if not self._is_pure:
            pass  # a value written to in between would be read again
        elif packet in _VIEWS and isinstance(node.args[0], Node):
            try:
                before = viewed(shape_of(node), shape_of(node.args[0]), cut, self._axis.size, node)
            except (Borders, Undivided):
                before = None
            if before is not None and before.fits(2 * self._axis.size):
                sizes = list(local_shape(shape_of(node), cut, self._axis.size))
                return self._call(_aten.reshape.default, (self._obtain(node.args[0], before), sizes), {})
        elif is_operator(node) and not is_mutable(node) and (is_pointwise(node) or packet in _CONVERSIONS):

            def part(each: Node) -> Node:
                dim, shape = cut.dim - len(shape_of(node)) + len(shape_of(each)), shape_of(each)
                there = dim >= 0 and shape[dim] == cut.whole
                return self._obtain(each, cut.at(dim) if there else FULL)

            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), part)
            return self._call(node.target, args, kwargs)
        return self._call(own_tokens, (self._obtain(node, FULL), cut.dim, cut.parts, self._axis.ranks), {})

    def _call(self, target: Callable[..., Any] | Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Node:
        new = self.graph.call_function(target, tuple(args), dict(kwargs))
        new.meta = {name: value for name, value in self._at.meta.items() if name == "modes"}
        return new


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _title(node: Node) -> str:
    return str(node.target) if is_operator(node) else getattr(node.target, "__name__", str(node.target))
