"""Dependencies in a captured graph: which values need weights, which memory is written to, and what is used at all."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from torch import fx

from autofunc.captured.export import Exported
from autofunc.decisions import is_check
from autofunc.errors import ModelError
from autofunc.graph.lines import line_of
from autofunc.graph.memory import base_of, is_copied_first, is_number, written
from autofunc.graph.reach import reachable

Node = fx.Node


class Flow:
    """The dependencies of a captured forward.

    A value is *weighted* when parameters or state are among its ancestors. Weighted values are computed once, by the layer
    they belong to, and cross boundaries. All others depend on the batch and constants alone, and every stage that needs
    them computes them itself.

    Raises:
        ModelError: for a write to a parameter or the batch, and for a plain number made from weighted values.
    """

    def __init__(self, exported: Exported, what: str) -> None:
        self.exported = exported
        self.nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self._base = {node: base_of(node) for node in exported.graph.nodes}
        self.writes: dict[Node, list[Node]] = {}  # base -> the nodes that write to its memory, in order
        self._needs: dict[Node, list[Node]] = {}
        for node in self.nodes:
            if "_foreach_" in str(node.target) and written(node):
                raise ModelError(
                    f"{what} writes to a list of tensors ({node.target}; {line_of(node)}); write to one tensor at a time"
                )
            for target in written(node):
                self._check(self._base[target], node, what)
                self.writes.setdefault(self._base[target], []).append(node)
        self.weighted = self._weighted()
        number = next((node for node in self.nodes if node in self.weighted & self.alive and is_number(node)), None)
        if number is not None:
            raise ModelError(
                f"{what} makes a plain number from values that depend on weights ({line_of(number)}); keep it a tensor: "
                "no .item()"
            )

    def needs(self, node: Node) -> list[Node]:
        """Return what must run before a node: its arguments, and earlier writes to their memory."""
        if node not in self._needs:
            found: dict[Node, None] = dict.fromkeys(node.all_input_nodes)
            for argument in list(found):
                for write in self.writes.get(self._base[argument], ()):
                    if self.position[write] < self.position.get(node, len(self.nodes)) and write is not node:
                        found[write] = None
            self._needs[node] = list(found)
        return self._needs[node]

    def writes_to(self, node: Node) -> list[Node]:
        """Return all writes to a node's memory, in order."""
        return self.writes.get(self._base[node], [])

    def closure(self, roots: Iterable[Node]) -> set[Node]:
        """Return these nodes and everything they need."""
        return reachable(roots, self.needs)

    @cached_property
    def returned(self) -> list[Node]:
        """Nodes among the values that forward returns."""
        return [each for each in self.exported.returned if isinstance(each, Node)]

    @cached_property
    def checks(self) -> list[Node]:
        """Nodes that stop the step if a batch decides differently from the example; nothing reads them."""
        return [node for node in self.nodes if is_check(node)]

    @cached_property
    def alive(self) -> set[Node]:
        """Everything that the returned values, the new state and the checks need."""
        roots = [*self.returned, *self.exported.states.values(), *self.checks]
        return self.closure([*roots, *self.needs(self.exported.graph.output_node())])

    @cached_property
    def first_weighted(self) -> int:
        """Position of the first live node that needs weights."""
        return min((self.position[node] for node in self.nodes if node in self.weighted and node in self.alive), default=0)

    @cached_property
    def users(self) -> dict[Node, list[Node]]:
        """The live nodes that need each node."""
        found: dict[Node, list[Node]] = {}
        for node in self.nodes:
            if node in self.alive:
                for needed in self.needs(node):
                    found.setdefault(needed, []).append(node)
        return found

    @cached_property
    def uncuttable(self) -> list[tuple[int, int]]:
        """(first, last) positions of memory that weighted values are written into; a cut may not separate them.

        Also of the operators that read a state and write its next value.
        """
        spans = []
        for base, writes in self.writes.items():
            if any(node in self.weighted for node in (base, *writes)):
                spans.append((self.position[base], max(self.position[write] for write in writes)))
        for state, after in self.exported.states.items():
            places = [self.position[node] for node in (*state.users, after) if node in self.position and node in self.alive]
            if after is not state:
                spans.append((min(places), max(places)))
        return spans

    def _weighted(self) -> set[Node]:
        states = self.exported.states
        weighted: set[Node] = {*self.exported.params, *states, *states.values()}
        members: dict[Node, list[Node]] = {base: [] for base in self.writes}
        for node in self.nodes:
            if self._base[node] in members:
                members[self._base[node]].append(node)
        grown = True
        while grown:
            size = len(weighted)
            for node in self.nodes:
                if not weighted.isdisjoint(self.needs(node)):
                    weighted.add(node)
            for base, writes in self.writes.items():
                last = max(self.position[write] for write in writes)
                read_before = any(
                    user in weighted and self.position[user] < last
                    for member in members[base] for user in member.users if user in self.position
                )  # fmt: skip
                if read_before or any(node in weighted for node in (*members[base], *writes)):
                    weighted.update(members[base], writes)
            grown = len(weighted) > size
        return weighted

    def _check(self, base: Node, write: Node, what: str) -> None:
        exported = self.exported
        if base in exported.params:
            raise ModelError(
                f"{what} writes to its parameter {exported.params[base]!r} ({write.target}; {line_of(write)}); a forward "
                "is a pure function: compute a new tensor instead"
            )
        if base in exported.constants and not is_copied_first(base):
            raise ModelError(
                f"{what} writes to a tensor that it keeps ({write.target}; {line_of(write)}); return it, or recompute it"
            )
        if base in exported.inputs:
            raise ModelError(
                f"{what} writes to the batch ({write.target}; {line_of(write)}), which other stages read; write to a copy: "
                "x = x.clone()"
            )
