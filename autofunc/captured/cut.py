"""A captured forward cut into segments, one per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import fx

from autofunc.captured.flow import Flow
from autofunc.captured.segment import Instruction, Ref, Segment, plain
from autofunc.captured.strides import as_strided_as_captured
from autofunc.errors import ModelError
from autofunc.graph.lines import line_of
from autofunc.graph.memory import is_all_of_its_memory
from autofunc.graph.schema import arguments

Node = fx.Node


class Cut:
    """A captured forward and its layers.

    Args:
        flow: the captured forward.
        starts: for each layer after the first, the position of its first operator.
        inner_paths: for each layer, a parameter's name in the module -> its path inside the layer.
    """

    def __init__(self, flow: Flow, starts: Sequence[int], inner_paths: Sequence[Mapping[str, str]]) -> None:
        self._flow, self._inner_paths = flow, inner_paths
        self._layer: dict[Node, int] = {}
        for position, node in enumerate(flow.nodes):
            if node.target is getitem and node.args[0] in self._layer:
                self._layer[node] = self._layer[node.args[0]]
            else:
                self._layer[node] = sum(start <= position for start in starts)
        for state, after in flow.exported.states.items():  # a state belongs to the first layer that needs it
            needing = [node for node in (*state.users, after) if node in self._layer and node in flow.alive]
            if needing:
                self._layer[state] = min(self._layer[node] for node in needing)
        self._num_layers = len(starts) + 1
        self._shared: dict[tuple[int, ...], tuple[Segment, tuple[str, ...]]] = {}

    @cached_property
    def params(self) -> list[list[str]]:
        """For each layer, the names of the parameters it uses, in the order of the graph."""
        names = self._flow.exported.params
        return [[names[node] for node in names if node in used] for used in map(set, self._arguments)]

    @cached_property
    def states(self) -> list[list[str]]:
        """For each layer, the names of the buffers that are its state."""
        exported = self._flow.exported
        return [[exported.buffers[node] for node in self._states_of(layer)] for layer in range(self._num_layers)]

    def _states_of(self, layer: int) -> list[Node]:
        return [node for node in self._flow.exported.states if self._layer.get(node) == layer]

    @cached_property
    def crossing(self) -> list[list[Node]]:
        """The values each layer receives, in the order they are made; the first layer receives none."""
        flow, last = self._flow, self._num_layers
        latest: dict[Node, int] = {}
        made = [*(node for node in flow.exported.states if node in self._layer), *self._live]
        for node in made:
            users = [self._layer[user] for user in flow.users.get(node, ()) if user in flow.weighted]
            if node in flow.returned:
                users.append(last - 1)
            latest[node] = max(users, default=0)
        return [
            [node for node in made if self._layer[node] < layer <= latest[node] and not _is_several(node)]
            for layer in range(last)
        ]

    @cached_property
    def segments(self) -> list[Segment]:
        """One segment per layer, in order.

        Raises:
            ModelError: for a state read and written in different layers, and an `as_strided` of memory behind a cut.
        """
        return [self._segment(layer) for layer in range(self._num_layers)]

    def shared(self, layers: Iterable[int]) -> tuple[Segment, tuple[str, ...]]:
        """Return a segment that makes what `layers` need of the batch and constants alone, and the names of its results."""
        key = tuple(layers)
        if key not in self._shared:
            flow = self._flow
            wanted = [node for node in self._unweighted if any(node in self._shared_by(layer) for layer in key)]
            # decisions by the batch alone are checked once, by the first stage
            checks = [node for node in flow.checks if node not in flow.weighted and 0 in key]
            needed = flow.closure([*wanted, *checks, *(write for node in wanted for write in flow.writes_to(node))])
            nodes = [node for node in flow.nodes if node in needed]
            segment = self._build([], list(flow.exported.inputs), [], nodes, [_Returned(node) for node in wanted])
            self._shared[key] = segment, tuple(node.name for node in wanted)
        return self._shared[key]

    @cached_property
    def _live(self) -> list[Node]:
        return [node for node in self._flow.nodes if node in self._flow.weighted and node in self._flow.alive]

    @cached_property
    def _unweighted(self) -> list[Node]:
        return [node for node in self._flow.exported.graph.nodes if node not in self._flow.weighted and node.op != "output"]

    @cached_property
    def _arguments(self) -> list[list[Node]]:
        """For each layer, everything its operators read."""
        found: list[dict[Node, None]] = [{} for _ in range(self._num_layers)]
        for node in self._live:
            found[self._layer[node]].update(dict.fromkeys(node.all_input_nodes))
        found[-1].update(dict.fromkeys(self._flow.returned))
        return [list(each) for each in found]

    def _shared_by(self, layer: int) -> set[Node]:
        constants = self._flow.exported.constants
        return {node for node in self._arguments[layer] if node not in self._flow.weighted and node not in constants}

    def _segment(self, layer: int) -> Segment:
        exported = self._flow.exported
        inner = self._inner_paths[layer]
        params = [node for node in exported.params if node in set(self._arguments[layer])]
        returned: list[Any]
        if layer == self._num_layers - 1:
            returned, spec = (
                [_Returned(each) if isinstance(each, Node) else each for each in exported.returned],
                exported.output,
            )
        else:
            returned, spec = [_Returned(node) for node in self.crossing[layer + 1]], None
        states = self._states_of(layer)
        for node in states:
            after = exported.states[node]
            if self._layer[after] != layer:
                raise ModelError(
                    f"the state {exported.buffers[node]!r} is read in one layer and written in a later one "
                    f"({line_of(after)}); cut after that line"
                )
        return self._build(
            [(inner[exported.params[node]], node) for node in params],
            self.crossing[layer],
            sorted(self._shared_by(layer), key=lambda node: node.name),
            [node for node in self._live if self._layer[node] == layer],
            returned,
            spec,
            [(inner[exported.buffers[node]], node, exported.states[node]) for node in states],
        )

    def _build(
        self,
        params: Sequence[tuple[str, Node]],
        received: Sequence[Node],
        shared: Sequence[Node],
        nodes: Sequence[Node],
        returned: Sequence[Any],
        spec: Any = None,
        states: Sequence[tuple[str, Node, Node]] = (),
    ) -> Segment:
        own = set(nodes)
        returned_nodes = {each.node for each in returned if isinstance(each, _Returned)}
        arguments = {argument for node in nodes for argument in node.all_input_nodes} | returned_nodes
        constants = [node for node in self._constants if node in arguments and node not in own]
        given = [*(node for _, node in params), *(node for _, node, _ in states), *received, *shared, *constants]
        register = {node: number for number, node in enumerate(given)}
        instructions = []
        for number, node in enumerate(nodes, start=len(given)):
            register[node] = number
            target, read = self._for_any_strides(node)
            args = tuple(plain(argument, register) for argument in read)
            kwargs = tuple((name, plain(argument, register)) for name, argument in node.kwargs.items())
            instructions.append(Instruction(target, args, kwargs, number, node.meta.get("modes", ())))
        return Segment(
            tuple(path for path, _ in params),
            len(received),
            tuple(node.name for node in shared),
            tuple(self._flow.exported.constants[node] for node in constants),
            tuple(instructions),
            tuple(Ref(register[each.node]) if isinstance(each, _Returned) else each for each in returned),
            spec,
            tuple(path for path, _, _ in states),
            tuple(Ref(register[after]) for _, _, after in states),
            tuple(str(node.meta.get("stack_trace", "")) for node in nodes),
        )

    def _for_any_strides(self, node: Node) -> tuple[Any, tuple[Any, ...]]:
        """Return an operator and arguments that do the same when its operand's strides differ from the whole forward's.

        Behind a cut values are contiguous, and fake tensors may promise strides that kernels do not give.
        """
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or self._flow.writes_to(source):
            return node.target, node.args  # a view that is written through must stay a view
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            return torch.ops.aten.reshape.default, node.args
        if node.target is torch.ops.aten.as_strided.default:
            if not is_all_of_its_memory(source):
                raise ModelError(
                    f"as_strided reads memory outside its tensor ({line_of(node)}), which does not exist behind a cut; use "
                    "views and indexing"
                )
            return as_strided_as_captured, (*arguments(node).values(), tuple(source.meta["val"].stride()))
        return node.target, node.args

    @cached_property
    def _constants(self) -> list[Node]:
        return [node for node in self._flow.exported.graph.nodes if node in self._flow.exported.constants]


class _Returned:
    """A node that is returned, before its register is known."""

    def __init__(self, node: Node) -> None:
        self.node = node


def _is_several(node: Node) -> bool:
    """True if an operator returns a list of tensors, which are taken out one at a time."""
    return isinstance(node.meta.get("val"), (list, tuple))
