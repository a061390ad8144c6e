"""Rows that a mask did not choose are discarded where rows are written back, so that nothing after that sees them.

A forward that takes `h[mask]` through an expert and adds it to `out[mask]` gives the same with every row of `h`, if rows
that do not count add zeros where rows are added, and change nothing where rows are put. Nothing else may see which rows
there are.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.captured.all_places import ROWS_OF_DATA, is_body, is_body_end, is_places
from autofunc.captured.elements import fold_elements
from autofunc.captured.row_dims import MixesRows, Rows, aligned, same_mask
from autofunc.captured.separate_rows import indexed, rows_of_result
from autofunc.decisions import is_check
from autofunc.errors import ModelError
from autofunc.graph.lines import first_lines, line_of
from autofunc.graph.memory import base_of, written
from autofunc.graph.schema import arguments, is_pointwise

Node = fx.Node

_aten = torch.ops.aten

ALL_ROWS = "experts compute all rows, and discard those that were not chosen"
"""A note for the user, followed by the lines."""

_SCATTERING = (_aten.scatter_add.default, _aten.scatter_add_.default)
_ADDING = (_aten.index_add.default, _aten.index_add_.default, *_SCATTERING)
_REPLACING = ("aten.copy_.default", "aten.zero_.default", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.dropout_.default")
_PUTTING = (_aten.index_put.default, _aten.index_put_.default)


def leave_out_rows(graph: fx.Graph, what: str) -> list[str]:
    """Change a graph in place, so that plain operators compute all places of masks.

    Args:
        graph: an export; it may write in place.
        what: a name for messages.

    Returns:
        Notes for the user.

    Raises:
        ModelError: if anything sees which rows there are, except operators that write them back.
    """
    sources = [node for node in graph.nodes if is_places(node)]
    if not sources:
        return []
    lines = first_lines(str(node.args[1]) for node in sources)
    fold_elements(graph)
    _LeavingOut(graph, what).run()
    graph.lint()
    return [f"{ALL_ROWS}: {lines}"]


class _LeavingOut:
    """The rewriting of one graph."""

    def __init__(self, graph: fx.Graph, what: str) -> None:
        self._graph, self._what = graph, what
        self._known: dict[Node, Rows] = {}
        self._counts: dict[Node, Node] = {}  # all places -> the bool vector of those that count
        self._home: dict[Node, tuple[Node, ...]] = {}  # node -> the loop runs it is in, outermost first
        self._nodes = list(graph.nodes)
        values = (node.meta.get("val") for node in self._nodes)
        fake: Any = next(value for value in values if isinstance(value, Tensor))
        self._mode = fake.fake_mode

    def run(self) -> None:
        """Go through the graph in order."""
        inside: tuple[Node, ...] = ()
        for node in self._nodes:
            if is_body_end(node):
                inside = inside[:-1]
                continue
            inside = (*inside, node) if is_body(node) else inside
            self._home[node] = inside
            self._check_home(node)
            try:
                self._visit(node)
            except MixesRows:
                masks = (mask for read in node.all_input_nodes for mask in self._known.get(read, {}).values())
                inside_of = (self._places(each) for each in inside)
                raise ModelError(self._refusal(node, next(chain(masks, inside_of)), "sees which rows there are")) from None
        for node in reversed(self._nodes):
            self._replace(node)

    def _visit(self, node: Node) -> None:
        rows = {read for read in node.all_input_nodes if self._known.get(read)}
        if is_places(node):
            if rows:
                raise MixesRows
            self._known[node], self._counts[node] = {0: node}, self._counting(node)
        elif is_body(node):
            places: Any = node.args[0]
            if self._known.get(places, {}).keys() != {0}:
                raise MixesRows
        elif is_check(node):
            if rows or any(self._home[read] for read in node.all_input_nodes):
                raise MixesRows
        elif written(node):
            self._write(node)
        elif node.target in (*_ADDING, *_PUTTING) and rows:
            self._put(node, ())
        elif rows:
            self._known[node] = rows_of_result(node, self._known)

    def _check_home(self, node: Node) -> None:
        """Refuse reads of what another run of a loop makes; writes to memory outside the loop are allowed."""
        for read in node.all_input_nodes:
            made = base_of(read) if written(read) else read
            home = self._home[made]
            if self._home[node][: len(home)] != home:
                raise ModelError(self._refusal(node, self._places(home[-1]), "reads what a loop over them makes"))

    def _write(self, node: Node) -> None:
        """Follow a write in place: of rows to rows, or back from rows."""
        (target, *more) = written(node)
        home = self._home[base_of(target)]
        inside = self._home[node][len(home) :]
        reads_rows = any(self._known.get(read) for read in node.all_input_nodes)
        if not inside and not reads_rows:
            return
        if node.target in (*_ADDING, *_PUTTING):
            self._put(node, inside)
            return
        if inside or more or not (is_pointwise(node) or str(node.target) in _REPLACING):
            raise MixesRows
        rows = aligned(node, self._known)
        if rows.keys() != self._known.get(target, {}).keys():
            raise MixesRows
        self._known[node] = rows

    def _put(self, node: Node, inside: tuple[Node, ...]) -> None:
        """Make an operator add or put only rows that count.

        Args:
            node: the operator.
            inside: the loop runs that it is in, but the memory it writes to is not.
        """
        if self._known.get(arguments(node)["self"]):
            raise MixesRows
        conditions = [self._element(each, node) for each in inside]
        if node.target in _ADDING:
            self._add(node, conditions)
        elif arguments(node)["accumulate"]:
            mask, dim, shape = self._indexed(node)
            self._only(node, "values", self._conditions(conditions, mask, dim, len(shape), node))
        else:
            self._overwrite(node, conditions)

    def _add(self, node: Node, conditions: list[Node]) -> None:
        given = arguments(node)
        name = "src" if node.target in _SCATTERING else "source"
        count = given[name].meta["val"].dim()
        dim = given["dim"] % max(count, 1)
        index = self._known.get(given["index"], {})
        if name == "src" and given["index"].meta["val"].shape != given["src"].meta["val"].shape:
            raise MixesRows
        if index.keys() - {dim if name == "src" else 0}:
            raise MixesRows
        mask = next(iter(index.values()), None)
        self._check_value(given[name], mask, dim, count)
        self._only(node, name, self._conditions(conditions, mask, dim, count, node))

    def _indexed(self, node: Node) -> tuple[Node | None, int, tuple[int, ...]]:
        """Return the mask whose rows an `index_put` writes, their dim in the written value, and that value's shape."""
        given = arguments(node)
        rows, dim = indexed(node, self._known)
        shape = self._value(_aten.index.Tensor, (given["self"], given["indices"])).shape
        mask = None if dim is None else rows[dim]
        self._check_value(given["values"], mask, dim or 0, len(shape))
        return mask, dim or 0, tuple(shape)

    def _check_value(self, value: Node, mask: Node | None, dim: int, count: int) -> None:
        """Refuse a written value unless it has rows of the same mask, or is the same for each row."""
        shape, own = value.meta["val"].shape, self._known.get(value, {})
        place = dim - count + len(shape)
        if own.keys() - {place} or any(mask is None or not same_mask(each, mask) for each in own.values()):
            raise MixesRows
        if mask is not None and not own and place >= 0 and shape[place] != 1:
            raise MixesRows

    def _conditions(self, inside: list[Node], mask: Node | None, dim: int, count: int, before: Node) -> list[Node]:
        """Return the conditions under which elements of a written value with `count` dims count."""
        if mask is None:
            return inside
        shape = [-1 if each == dim else 1 for each in range(count)]
        return [*inside, self._made(_aten.reshape.default, (self._counts[mask], shape), before)]

    def _only(self, node: Node, name: str, conditions: list[Node]) -> None:
        """Put zeros in place of what does not count; a product would turn infinities into NaN."""
        value = arguments(node)[name]
        for condition in conditions:
            value = self._made(_aten.where.ScalarOther, (condition, value, 0), node)
        _give(node, name, value)

    def _overwrite(self, node: Node, inside: list[Node]) -> None:
        """Put rows that do not count into one extra slice of the memory, which is dropped afterwards."""
        given = arguments(node)
        whole, indices = given["self"], list(given["indices"])
        mask, _, _ = self._indexed(node)
        if mask is None:
            old = self._made(_aten.index.Tensor, (whole, indices), node)
            for condition in inside:
                _give(node, "values", self._made(_aten.where.self, (condition, arguments(node)["values"], old), node))
            return
        place = next(place for place, index in enumerate(indices) if index is not None and self._known.get(index))
        (dim,), length = self._known[indices[place]], whole.meta["val"].shape[place]
        conditions = self._conditions(inside, mask, dim, indices[place].meta["val"].dim(), node)
        for condition in conditions:
            indices[place] = self._made(_aten.where.ScalarOther, (condition, indices[place], length), node)
        beside = self._made(_aten.slice.Tensor, (whole, place, 0, 1), node)
        longer = self._made(_aten.cat.default, ([whole, beside], place), node)
        longer = self._made(_aten.index_put.default, (longer, indices, given["values"]), node)
        made = self._made(_aten.slice.Tensor, (longer, place, 0, length), node)
        if written(node):
            made = self._made(_aten.copy_.default, (whole, made), node)
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)

    def _counting(self, places: Node) -> Node:
        """Return which places of a mask count, as the mask is at this point."""
        flat = self._made(_aten.reshape.default, (places.args[0], [-1]), places)
        return self._made(_aten.clone.default, (flat,), places)

    def _element(self, body: Node, before: Node) -> Node:
        """Return whether an element counts: a 0-dim bool."""
        return self._made(_aten.select.int, (self._counts[self._places(body)], 0, body.args[1]), before)

    def _places(self, body: Node) -> Node:
        """Return the places that a loop goes over."""
        (mask,) = self._known[body.args[0]].values()  # type: ignore[index]
        return mask

    def _replace(self, node: Node) -> None:
        """Replace an operator that only an export has by plain ones."""
        if is_body_end(node):
            self._graph.erase_node(node)
        elif is_body(node):
            node.replace_all_uses_with(self._made(_aten.select.int, (node.args[0], 0, node.args[1]), node))
            self._graph.erase_node(node)
        elif is_places(node):
            self._number(node)

    def _number(self, places: Node) -> None:
        """Compute the places of a mask, one column per dim."""
        mask: Tensor = places.args[0].meta["val"]  # type: ignore[union-attr]
        for column in list(places.users):
            dim: Any = column.args[1]
            step = mask.shape[dim + 1 :].numel()
            found = self._made(_aten.arange.default, (mask.numel(),), places, device=mask.device)
            found = self._made(_aten.div.Scalar_mode, (found, step), places, rounding_mode="floor")
            found = self._made(_aten.remainder.Scalar, (found, mask.shape[dim]), places)
            column.replace_all_uses_with(found)
            self._graph.erase_node(column)
        self._graph.erase_node(places)

    def _made(self, target: Any, args: tuple[Any, ...], before: Node, **kwargs: Any) -> Node:
        with self._graph.inserting_before(before):
            made = self._graph.call_function(target, args, kwargs)
        made.meta.update({key: before.meta[key] for key in ("modules", "modes", "stack_trace") if key in before.meta})
        made.meta["val"] = self._value(target, args, **kwargs)
        self._home[made] = self._home[before]
        return made

    def _value(self, target: Any, args: tuple[Any, ...], **kwargs: Any) -> Any:
        """Return what an operator makes, on fake tensors."""
        fakes: Any = fx.node.map_arg(args, lambda node: node.meta["val"])
        with self._mode, torch.no_grad():
            return target(*fakes, **kwargs)

    def _refusal(self, node: Node, mask: Node, how: str) -> str:
        reason = ROWS_OF_DATA.format(what=self._what, maker="a mask", line=mask.args[1])
        return f"{reason}; it returns them" if node.op == "output" else f"{reason}; {node.target} {how} ({line_of(node)})"


def _give(node: Node, name: str, value: Node) -> None:
    """Replace an argument of an operator."""
    if name in node.kwargs:
        node.update_kwarg(name, value)
    else:
        node.update_arg(list(arguments(node)).index(name), value)
