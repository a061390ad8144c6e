"""A layer, or a loss, as a graph of the operators it calls, with the sizes of the whole."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from autofunc import tree
from autofunc.captured.segment import Instruction, Segment
from autofunc.fake import is_own, user_line
from autofunc.graph.lines import line_in
from autofunc.graph.trace import trace
from autofunc.installed import is_of_torch

Node = fx.Node

_aten = torch.ops.aten
_TAKEN_APART = (
    _aten.einsum.default, _aten.broadcast_tensors.default, _aten.tensordot.default, _aten.inner.default,
    _aten.view_as.default, _aten.reshape_as.default, _aten.expand_as.default,
)  # fmt: skip
"""Operators that are recorded as the ones they consist of, which have rules."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A function of parameters, received values and entries of the batch, as a graph."""

    module: fx.GraphModule
    params: Mapping[str, Node]  # by path
    received: Sequence[Node]
    entries: Mapping[str, Node]  # by name
    states: Mapping[str, Node]  # by path
    after: Sequence[Node]  # of each state, what it is afterwards
    returned: Sequence[Any]  # nodes, and constants as they are
    spec: tree.TreeSpec
    made: Any  # its result, on fake tensors
    run: Callable[[], Any]  # runs it again, to find a line
    segment: Segment | None = None  # the piece of a captured graph it runs, if any, which knows its lines

    @property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that the graph holds, by name."""
        held = (str(node.target) for node in self.module.graph.nodes if node.op == "get_attr")
        return {name: getattr(self.module, name) for name in held}

    def line_of(self, node: Node) -> str:
        """Return the user's line that calls a node's operator; "" if it cannot be found."""
        name = _plain_name(node)
        before = 0
        for each in self.module.graph.nodes:
            if each is node:
                break
            before += each.op == "call_function" and _plain_name(each) == name
        if self.segment is not None:
            steps = zip(self.segment.instructions, self.segment.traces, strict=True)
            lines_of = [(_plain_name(step), line_in(trace)) for step, trace in steps]
            found = [line for each, line in lines_of if each == name]
            # the operators of a function that the segment calls as one are not in it by name
            found = found or [line for each, line in lines_of if each.startswith("<function ")][:1]
        else:
            lines = _Lines()
            with lines:
                self.run()
            found = lines.found.get(name, [])
        return found[min(before, len(found) - 1)] if found else ""


def traced(
    function: Callable[..., tuple[Any, Mapping[str, Tensor]]],
    params: Mapping[str, Tensor],
    received: Sequence[Tensor],
    entries: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    segment: Segment | None = None,
) -> Traced:
    """Trace a function on fake tensors.

    Args:
        function: of parameters by path, received values, entries of the batch by name, and state by path; returns its
            output, and the new state.
        params: of the whole, by path.
        received: of the whole.
        entries: of the whole, by name.
        states: of the whole, by path.
        segment: the piece of a captured graph that the function runs, if it runs one.
    """
    made: list[Any] = []

    def run(owned: list[Tensor], arriving: list[Tensor], given: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
        named = [dict(zip(names, each, strict=True)) for names, each in ((params, owned), (entries, given), (states, kept))]
        result, after = function(named[0], arriving, *named[1:])
        made.append(result)
        results = [leaf for leaf in tree.leaves_and_spec(result)[0] if isinstance(leaf, Tensor)]
        return [*results, *(after[path] for path in states)]

    given = list(params.values()), list(received), list(entries.values()), list(states.values())
    module = trace(run, *given, decompositions={each: each.decompose for each in _TAKEN_APART}, above_autograd=True)
    placeholders = iter([node for node in module.graph.nodes if node.op == "placeholder"])
    (results,) = next(node for node in module.graph.nodes if node.op == "output").args
    remaining = iter(results)
    leaves, spec = tree.leaves_and_spec(made[-1])
    returned = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return Traced(
        module, {path: next(placeholders) for path in params}, [next(placeholders) for _ in received],
        {name: next(placeholders) for name in entries}, {path: next(placeholders) for path in states}, list(remaining),
        returned, spec, function(params, received, entries, states)[0],
        lambda: function(params, received, entries, states), segment,
    )  # fmt: skip


class _Lines(TorchFunctionMode):
    """Notes the user's line of each call, by the function's name."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = len(traceback.extract_stack())  # the frames so far belong to the layer's caller
        self.found: dict[str, list[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frames = traceback.StackSummary.from_list(traceback.extract_stack()[self._depth :])
        if any(not is_of_torch(frame.filename) and not is_own(frame) for frame in frames):
            name = getattr(func, "__name__", "").removesuffix("_")
            self.found.setdefault(name, []).append(user_line(frames))
        return func(*args, **(kwargs or {}))


def _plain_name(node: Node | Instruction) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0].removesuffix("_")
