"""Functions mapped by `torch.vmap`, rewritten as the batched operators they run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from autofunc.errors import ModelError
from autofunc.graph.lines import line_of
from autofunc.graph.trace import trace

Node = fx.Node

_BEGIN, _END = "_vmap_increment_nesting", "_vmap_decrement_nesting"
_KNOWN = (_BEGIN, _END, "_add_batch_dim", "_remove_batch_dim", "lazy_load_decompositions")


def unmap(root: fx.GraphModule) -> None:
    """Replace mapped functions by operators, in a graph and its subgraphs.

    Functions both mapped and differentiated are left alone.
    """
    for part in root.modules():
        if isinstance(part, fx.GraphModule):
            for node in list(part.graph.nodes):
                if _name(node) == "lazy_load_decompositions":  # loads kernels, once per process
                    part.graph.erase_node(node)
            for region in _regions(part.graph):
                if all(_name(node) in _KNOWN for node in region if "functorch" in _home(node)):
                    _replace(part, region)


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", ""))


def _home(node: Node) -> str:
    return str(getattr(node.target, "__module__", ""))


def _regions(graph: fx.Graph) -> list[list[Node]]:
    """Return the nodes between the beginning and the end of each outermost map, both included."""
    found: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if _name(node) == _BEGIN:
            found += [[]] if depth == 0 else []
            depth += 1
        if depth:
            found[-1].append(node)
        depth -= _name(node) == _END
    return found


def _replace(part: fx.GraphModule, region: list[Node]) -> None:
    inside = set(region)
    given = list(dict.fromkeys(each for node in region for each in node.all_input_nodes if each not in inside))
    tensors = [node for node in given if isinstance(node.meta.get("val"), Tensor)]
    fixed = {node: getattr(part, str(node.target)) for node in (*given, *region) if node.op == "get_attr"}
    returned = [node for node in region if any(user not in inside for user in node.users)]

    def run(*values: Tensor) -> list[Any]:
        known: dict[Node, Any] = {**fixed, **dict(zip(tensors, values, strict=True))}
        for node in region:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [known[node] for node in returned]

    fakes = [node.meta["val"] for node in (*tensors, *region) if isinstance(node.meta.get("val"), Tensor)]
    with getattr(fakes[0], "fake_mode"):  # noqa: B009  # a fake tensor's
        traced = trace(run, *(node.meta["val"] for node in tensors))
    made: dict[Node, Any] = dict(
        zip((node for node in traced.graph.nodes if node.op == "placeholder"), tensors, strict=True)
    )
    with part.graph.inserting_before(region[0]):
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                raise ModelError(f"a function under vmap closes over a tensor ({line_of(region[0])}); make it an argument")
            if node.op == "call_function":
                made[node] = part.graph.node_copy(node, made.__getitem__)
                for key in ("nn_module_stack", "stack_trace"):
                    made[node].meta[key] = returned[0].meta.get(key)
    results: Any = traced.graph.output_node().args[0]
    for node, result in zip(returned, results, strict=True):
        node.replace_all_uses_with(made[result], lambda user: user not in inside)
    for node in reversed(region):
        part.graph.erase_node(node)
