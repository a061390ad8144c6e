"""From a piece of a graph to a Python function that runs it.

The function takes one list, empties it, and frees every value after its last use, so that nothing lives longer than
it must: an input is freed as soon as the piece is done with it, if nobody else holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from functools import partial
from operator import getitem
from typing import Any

from torch import Tensor, fx

from autofunc.engine.direct import DIRECT
from autofunc.engine.layouts import Watch, laid_out
from autofunc.engine.partition import Piece, in_order
from autofunc.graph.exchanges import beginning_of, is_wait
from autofunc.graph.last_use import last_uses

Node = fx.Node
Runnable = Callable[[list[Any]], Sequence[Tensor]]
"""Takes the piece's inputs (then the accumulators it adds to), empties the list, returns the outputs."""
Interleaved = Callable[[list[Any]], Generator[bool | None, None, Sequence[Tensor]]]
"""The same as a generator. It yields None where another piece may continue, True before a wait and False after it."""


def emit(
    piece: Piece, order: list[Node], attributes: Mapping[str, Any], name: str, *,
    whole: Set[Node] = frozenset(), arrivals: Mapping[Node, int] | None = None, donated: Mapping[Node, Any] | None = None,
) -> Runnable:  # fmt: skip
    """Compile a piece. Its first call also checks how values are really laid out, see `layouts`; its results are valid too.

    Args:
        piece: what to compute.
        order: all nodes of the joint graph, in order.
        attributes: values of its `get_attr` nodes.
        name: of the function, for tracebacks.
        whole: nodes passed on to other pieces or stages, laid out as they were captured.
        arrivals: layer of each parameter that may still be in transit: the function then takes, as its last argument, a
            function that waits for a layer's parameters, and calls it before each layer's first use.
        donated: nodes that write in place, and the operators to use, see `donation`.
    """
    emitter = _Emitter(piece, order, attributes, name, arrivals or {}, donated or {}, None)
    settled: list[Runnable] = []

    def run(given: list[Any]) -> Sequence[Tensor]:
        if settled:
            return settled[0](given)
        watch = Watch(whole)
        made: Sequence[Tensor] = emitter.function(watch, watched=True)(given)
        settled.append(emitter.function(watch))
        return made

    return run


def emit_interleaved(
    piece: Piece, order: list[Node], attributes: Mapping[str, Any], name: str, stops: Sequence[int], *,
    whole: Set[Node] = frozenset(), arrivals: Mapping[Node, int] | None = None,
) -> Interleaved:  # fmt: skip
    """Compile a piece as a generator. It waits for an exchange between ranks only where it reads the result.

    Args:
        stops: where it yields: before these nodes, by index in `partition.in_order`.
        piece, order, attributes, name, whole, arrivals: see `emit`.
    """
    emitter = _Emitter(piece, order, attributes, name, arrivals or {}, {}, stops)
    settled: list[Interleaved] = []

    def first(given: list[Any]) -> Generator[bool | None, None, Sequence[Tensor]]:
        watch = Watch(whole)
        made: Sequence[Tensor] = yield from emitter.function(watch, watched=True)(given)
        settled.append(emitter.function(watch))
        return made

    return lambda given: settled[0](given) if settled else first(given)


class _Emitter:
    def __init__(
        self, piece: Piece, order: list[Node], attributes: Mapping[str, Any], name: str, arrivals: Mapping[Node, int],
        donated: Mapping[Node, Any], stops: Sequence[int] | None,
    ) -> None:  # fmt: skip
        self.stops = stops  # None: not a generator
        self.piece, self.attributes, self.name, self.arrivals, self.donated = piece, attributes, name, arrivals, donated
        self.values: dict[str, Any] = {}  # constants and functions that the code refers to
        self.nodes = in_order(piece, order)
        self.names = {node: f"v{index}" for index, node in enumerate([*self.piece.inputs, *self.nodes])}

    def function(self, watch: Watch, *, watched: bool = False) -> Any:
        """Write the code and compile it.

        Args:
            watch: which values must be laid out again.
            watched: make this call find that out.
        """
        self.values, self.watch, self.watched = {}, watch, watched
        under_way: dict[Node, list[str]] = {}  # exchanges under way -> statements to run as soon as the result has arrived
        sums = [f"acc{index}" for index in range(len(self.piece.adds))]
        taken = [*(self.names[node] for node in self.piece.inputs), *sums, *(["ready"] if self.arrivals else [])]
        arrived: set[int] = set()
        lines = [f"def {self.name}(given):"]
        if taken:
            lines.append(f"    [{', '.join(taken)}] = given")
            if watched:
                looked = self._constant(partial(watch.given, self.piece.inputs))
                lines.append(f"    {looked}(given[:{len(self.piece.inputs)}])")
            lines.append("    given.clear()")
        kept = {*self.piece.outputs, *(node for _, node in self.piece.adds if node in self.piece.inputs)}
        used = kept.union(*(node.all_input_nodes for node in self.nodes))
        unused = [self.names[node] for node in self.piece.inputs if node not in used]
        if unused:
            lines.append(f"    del {', '.join(unused)}")
        done = last_uses([(node, node.all_input_nodes) for node in self.nodes], kept)
        for number, (node, dead) in enumerate(zip(self.nodes, done, strict=True)):
            lines += ["    yield"] * (self.stops or []).count(number)
            lines += self._waits(node.all_input_nodes, under_way)
            awaited = {self.arrivals[read] for read in node.all_input_nodes if read in self.arrivals} - arrived
            lines += [f"    ready({layer})" for layer in sorted(awaited)]
            arrived |= awaited
            call = f"    {self.names[node]} = {self._call(node)}"
            lines += self._waiting(call) if is_wait(node) else [call]
            if self._begins(node) is None:
                lines += self._adds(node, sums)
            else:
                gone = [each for each in dead if each is node]  # used only in a sum
                under_way[node] = self._adds(node, sums) + self._deletes(gone)
                dead = [each for each in dead if each is not node]
            lines += self._deletes(dead)
        lines += ["    yield"] * (self.stops or []).count(len(self.nodes))
        for index, (_, node) in enumerate(self.piece.adds):
            if node in self.piece.inputs:  # a gradient that is an input itself
                lines.append(f"    {sums[index]}.add_({self.names[node]})")
        lines += self._waits(list(under_way), under_way)
        lines.append(f"    return [{', '.join(map(self._returned, self.piece.outputs))}]")
        if self.stops is not None:
            lines.append("    yield")  # a generator even if it has no stops
        scope = dict(self.values)
        exec(compile("\n".join(lines), f"<{self.name}>", "exec"), scope)
        return scope[self.name]

    def _adds(self, node: Node, sums: list[str]) -> list[str]:
        """Write statements that add a gradient to its accumulator, right after it is computed."""
        return [
            f"    {sums[index]}.add_({self.names[node]})"
            for index, (_, gradient) in enumerate(self.piece.adds)
            if gradient is node
        ]

    def _deletes(self, nodes: Sequence[Node]) -> list[str]:
        return [f"    del {', '.join(self.names[each] for each in nodes)}"] if nodes else []

    def _begins(self, node: Node) -> Callable[..., Any] | None:
        """Return what begins an exchange that is waited for later. The first call waits at once, to check layouts."""
        return beginning_of(node) if self.stops is not None and not self.watched else None

    def _waits(self, read: Sequence[Node], under_way: dict[Node, list[str]]) -> list[str]:
        """Write statements that wait for those of the values read that are under way."""
        lines = []
        for node in read:
            if node in under_way:
                lines += [*self._waiting(f"    {self.names[node]} = {self.names[node]}()"), *under_way.pop(node)]
        return lines

    def _waiting(self, statement: str) -> list[str]:
        """Write a statement that waits, between yields that announce it."""
        return [statement] if self.stops is None else ["    yield True", statement, "    yield False"]

    def _call(self, node: Node) -> str:
        if node.op == "get_attr":
            return self._constant(self.attributes[str(node.target)])
        if node.target is getitem and not self.watched:
            return f"{self._text(node.args[0])}[{self._text(node.args[1])}]"
        relaid: Set[Node] = frozenset() if self.watched else self.watch.relaid.get(node, frozenset())
        arguments = [self._text(argument, relaid) for argument in node.args]
        arguments += [f"{key}={self._text(value, relaid)}" for key, value in node.kwargs.items()]
        target = self._begins(node) or self.donated.get(node) or DIRECT.get(node.target, node.target)
        return f"{self._constant(self.watch.calling(node) if self.watched else target)}({', '.join(arguments)})"

    def _returned(self, node: Node) -> str:
        if self.watched:
            return f"{self._constant(self.watch.returning(node))}({self.names[node]})"
        return self._relaid(node) if node in self.watch.relaid_outputs else self.names[node]

    def _relaid(self, node: Node) -> str:
        return f"{self._constant(laid_out)}({self.names[node]}, {self._constant(node)})"

    def _text(self, value: Any, relaid: Set[Node] = frozenset()) -> str:
        if isinstance(value, Node):
            return self._relaid(value) if value in relaid else self.names[value]
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self._text(one, relaid)}, " for one in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        """Return the name in the function's scope of a value that cannot be written as text."""
        for name, known in self.values.items():
            if known is value:
                return name
        name = f"c{len(self.values)}"
        self.values[name] = value
        return name
