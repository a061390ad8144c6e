"""Rewrite a graph with full sizes into the one that each rank of an axis runs, the same on all of them.

Operators on parts get the sizes of parts. Where a layout has to change, a movement is inserted: once per value, before its
first use in that layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, fx

from autofunc.spreading import movements
from autofunc.spreading.layouts import FULL, TERMS, Cut, Kind, Layout, local_shape
from autofunc.spreading.operation import Want
from autofunc.spreading.propagate import Propagation, is_differentiable
from autofunc.spreading.sharing import Sharing

Node = fx.Node


class Rewriting:
    """A graph over ranks.

    Args:
        graph: of the whole.
        propagation: the layouts of its values.
        terms: names of the parameters of whose gradients each rank has a term, whatever the batch; see `AxisPlan`.

    Attributes:
        graph: the new one.
        values: node of the whole -> its node in the new graph: the whole value, or each rank's part or term if nothing
            needs it whole.
        first: node of the whole -> the first new node that belongs to it.
    """

    def __init__(self, graph: fx.Graph, propagation: Propagation, terms: Collection[str]) -> None:
        self._found, self._whole = propagation, propagation.whole
        self._sharing = Sharing(propagation, terms)
        self._made: dict[tuple[Node, Any, bool], Node] = {}  # (node, layout, shared) -> new node
        self.graph, self.values, self.first = fx.Graph(), dict[Node, Node](), dict[Node, Node]()
        alive = set(self._whole.nodes)
        for node in graph.nodes:
            if node.op == "output":
                self._at = node
                for kept in self._whole.kept:
                    if kept in self._whole.weighted and kept in self.values:
                        self.values[kept] = self._kept(kept)
                self.graph.output(fx.node.map_arg(node.args[0], lambda each: self.values[each]))
            elif node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self._keep(node, self.graph.node_copy(node))
            elif node in alive:
                self._at = node
                self._emit(node)

    def _placeholder(self, node: Node) -> None:
        new = self.graph.placeholder(node.name)
        new.meta.update(node.meta)
        new.meta["val"] = self._local(node, self._found.layout(node))
        self._keep(node, new)

    def _kept(self, node: Node) -> Node:
        """Return a value as the forward hands it out: whole, or logits that a loss may use cut along the vocabulary."""
        own, value = self._found.layout(node), node.meta["val"]
        if isinstance(own, Cut) and own.dim == value.dim() - 1 and len(own.parts) == 1 and value.dim() > 2:
            new = self._call(
                movements.handed_out, (self._made[node, own, False], self._found.axis, own.dim), {}, FULL, node
            )
            new.meta["modes"] = ()
            return new
        return self._obtain(node, FULL, shared=False)

    def _keep(self, node: Node, new: Node) -> None:
        self.values[node] = new
        self._made[node, self._found.layout(node), node in self._sharing.shared] = new

    def _emit(self, node: Node) -> None:
        outcome = self._found.outcomes.get(node)
        if outcome is not None:
            args, kwargs = self._argument(outcome.args), {key: self._argument(each) for key, each in outcome.kwargs.items()}
            new = self._call(outcome.target, args, kwargs, outcome.layout)
        else:
            shared = node in self._sharing.shared
            new = self._call(*self._on_full(node, shared), self._found.layout(node))
        self._keep(node, new)

    def _on_full(self, node: Node, shared: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return an operator unchanged, on full operands; without a gradient it takes them shared or not."""
        gradient = is_differentiable(node)

        def full(each: Node) -> Node:
            several = isinstance(self._found.layout(each), tuple) or isinstance(each.meta.get("val"), (list, tuple))
            if several:
                return self.values[each]
            known = self._made.get((each, FULL, True))
            return known if known is not None and not gradient else self._obtain(each, FULL, shared=shared)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), full)
        return node.target, args, kwargs

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Want):
            return self._obtain(argument.node, argument.layout, shared=argument.layout is FULL)
        if isinstance(argument, Node):
            return self._obtain(argument, FULL, shared=True)
        return [self._argument(part) for part in argument] if isinstance(argument, (list, tuple)) else argument

    # --- values in the layouts that operators want

    def _obtain(self, node: Node, layout: Layout, *, shared: bool) -> Node:
        own = self._found.layout(node)
        if own is FULL and (node not in self._whole.weighted or not is_differentiable(node)):
            shared = False  # without a gradient it makes no difference
        if own is FULL and layout is FULL and node in self._sharing.shared and not shared:
            return self._once(node, FULL, False, movements.first_gradient, (node, FULL, True))
        known = self._made.get((node, layout, shared and layout is FULL))
        if known is None and own is FULL and layout is FULL and node in self._sharing.shared:
            known = self._made.get((node, FULL, True))
        if known is not None:
            return known
        if isinstance(own, Kind) and own is TERMS:
            return self._of_terms(node, layout, shared)
        if isinstance(own, Cut):
            return self._of_cut(node, own, layout, shared)
        return self._of_full(node, layout)

    def _of_full(self, node: Node, layout: Layout) -> Node:
        if layout is FULL:  # wanted as shared, and not shared yet
            if node in self._sharing.before:
                target, args, kwargs = self._on_full(node, shared=True)
                new = self._call(target, args, kwargs, FULL)
                self._made[node, FULL, True] = new
                return new
            return self._once(node, FULL, True, movements.share, (node, FULL, False))
        assert isinstance(layout, Cut), "a full value is not a term"
        if node in self._sharing.shared or node in self._sharing.wanted:
            self._obtain(node, FULL, shared=True)
            return self._once(node, layout, False, movements.piece_of_shared, self._shared_key(node), layout)
        move = movements.piece_of_same if is_differentiable(node) and node in self._whole.weighted else None
        return self._once(node, layout, False, move or movements.piece_of_shared, (node, FULL, False), layout)

    def _shared_key(self, node: Node) -> tuple[Node, Any, bool]:
        key = (node, FULL, True)
        return key if key in self._made else (node, FULL, False)

    def _of_cut(self, node: Node, own: Cut, layout: Layout, shared: bool) -> Node:
        if layout is FULL:
            move = movements.gather_to_share if shared else movements.gather
            return self._once(node, FULL, shared, move, (node, own, False), own)
        self._obtain(node, FULL, shared=True)
        assert isinstance(layout, Cut)
        return self._once(node, layout, False, movements.piece_of_shared, (node, FULL, True), layout)

    def _of_terms(self, node: Node, layout: Layout, shared: bool) -> Node:
        summed = self._found.added.get(node, FULL)
        if isinstance(summed, Cut):
            scattered = self._once(node, summed, False, movements.add_up_into, (node, TERMS, False), summed)
            return scattered if layout == summed else self._of_cut(node, summed, layout, shared)
        added = self._once(node, FULL, False, movements.add_up, (node, TERMS, False))
        if layout is FULL and not shared:
            return added
        return self._of_full(node, layout)

    def _once(
        self, node: Node, layout: Layout, shared: bool, move: Callable[..., Tensor], source: tuple[Node, Any, bool],
        cut: Cut | None = None,
    ) -> Node:  # fmt: skip
        key = (node, layout, shared)
        if key not in self._made:
            args: tuple[Any, ...] = (self._made[source], self._found.axis)
            args += (cut.dim, cut.parts) if cut is not None else ()
            new = self._call(move, args, {}, layout, node)
            new.meta["modes"] = ()  # later readers may need gradients
            self._made[key] = new
        return self._made[key]

    def _call(
        self, target: Any, args: Any, kwargs: Mapping[str, Any], layout: Any, of: Node | None = None
    ) -> Node:  # fmt: skip
        new = self.graph.call_function(target, tuple(args), dict(kwargs))
        new.meta.update(self._at.meta)
        new.meta["val"] = self._local(of or self._at, layout)
        self.first.setdefault(self._at, new)
        return new

    def _local(self, node: Node, layout: Any) -> Any:
        """Return a rank's part of a value, without memory."""
        value, size = node.meta.get("val"), self._found.size
        if isinstance(value, (list, tuple)):
            layouts = layout if isinstance(layout, tuple) else (layout,) * len(value)
            return type(value)(_like(each, one, size) for each, one in zip(value, layouts, strict=True))
        return _like(value, layout, size)


def _like(value: Any, layout: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or not isinstance(layout, Cut):
        return value
    return value.new_empty(local_shape(value.shape, layout, size))
