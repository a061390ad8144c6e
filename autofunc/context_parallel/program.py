"""A graph on one rank's tokens as a segment: plain data that can be compared and run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from autofunc import tree
from autofunc.captured.segment import Instruction, Ref, Segment, plain
from autofunc.context_parallel.traced import Traced
from autofunc.errors import ModelError
from autofunc.graph.reach import ancestors
from autofunc.graph.schema import is_mutable

Node = fx.Node

# the private functions that graphs hold for `with torch.no_grad()` and `with torch.autocast(...)`; torch 2.13.0
_GRAD, _AUTOCAST_ON, _AUTOCAST_OFF = "_set_grad_enabled", "_enter_autocast", "_exit_autocast"


def segment_of(
    whole: Traced, graph: fx.Graph, returned: Sequence[Any], what: str, pieces: Mapping[str, Node],
    after: Sequence[Node] = (),
) -> Segment:  # fmt: skip
    """Turn a rewritten graph into a segment.

    Args:
        whole: the graph before.
        graph: the graph after, whose placeholders are those before, then `pieces`. Operators nobody needs are dropped.
        returned: nodes, and constants as they are.
        what: a name for messages.
        pieces: more placeholders of values that layers share, by name.
        after: the new value of each state.

    Raises:
        ModelError: for autocast regions that are not nested.
    """
    before, now = ([node for node in each.nodes if node.op == "placeholder"] for each in (whole.module.graph, graph))
    placeholders, constants = dict(zip(before, now[: len(now) - len(pieces)], strict=True)), whole.constants
    params, shared, states = (
        {name: placeholders[node] for name, node in each.items()} for each in (whole.params, whole.entries, whole.states)
    )
    shared |= pieces
    received = [placeholders[node] for node in whole.received]
    modes = modes_of(graph, what)
    results = [each for each in (*returned, *after) if isinstance(each, Node)]
    kept = needed(graph, results)
    used = {argument for node in kept for argument in node.all_input_nodes} | {*results}
    params = {path: node for path, node in params.items() if node in used}
    shared = {name: node for name, node in shared.items() if node in used}
    fixed = [node for node in graph.nodes if node.op == "get_attr" and node in used]
    given = [*params.values(), *states.values(), *received, *shared.values(), *fixed]
    register = {node: number for number, node in enumerate(given)}
    instructions = []
    for node in graph.nodes:
        if node in kept and node in modes:
            register[node] = len(register)
            args = tuple(plain(each, register) for each in node.args)
            kwargs = tuple((name, plain(each, register)) for name, each in node.kwargs.items())
            instructions.append(Instruction(node.target, args, kwargs, register[node], modes[node]))
    return Segment(
        tuple(params), len(received), tuple(shared), tuple(constants[str(node.target)].detach() for node in fixed),
        tuple(instructions), tuple(Ref(register[each]) if isinstance(each, Node) else each for each in returned),
        _spec_of(whole.spec), tuple(states), tuple(Ref(register[each]) for each in after),
    )  # fmt: skip


def _spec_of(spec: tree.TreeSpec) -> tree.TreeSpec | None:
    """Return a spec as `Segment.spec` wants it: None for one tensor, or a tuple of tensors."""
    plain = [tree.leaves_and_spec(each)[1] for each in (0, tuple(range(spec.num_leaves)))]
    return None if spec in plain and spec.num_leaves else spec


def modes_of(graph: fx.Graph, what: str) -> dict[Node, tuple[tuple[Any, ...], ...]]:
    """Return the modes each operator runs under (`Instruction.modes`), without the nodes that enter and leave them."""
    found: dict[Node, tuple[tuple[Any, ...], ...]] = {}
    grad: tuple[tuple[Any, ...], ...] = ()
    casts: list[tuple[Node, tuple[Any, ...]]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", "")
        if name == _GRAD:
            grad = () if node.args[0] else (("grad", False),)
        elif name == _AUTOCAST_ON:
            casts.append((node, ("autocast", *node.args)))
        elif name == _AUTOCAST_OFF:
            if not casts or casts.pop()[0] is not node.args[0]:
                raise ModelError(f"{what}: its autocast regions overlap without being nested")
        else:
            found[node] = (*node.meta.get("modes", ()), *grad, *(cast for _, cast in casts))
    return found


def needed(graph: fx.Graph, roots: Iterable[Node]) -> set[Node]:
    """Return the nodes that some values need; writes in place are always needed, since they may write to any value."""
    return ancestors([*roots, *(node for node in graph.nodes if is_mutable(node))])
