"""Check that a loop over places has no effect except its writes: export again without its first and last runs.

A list it fills, or a plain number read after it, is in no graph. The operators outside the skipped runs would then change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from autofunc.captured.all_places import is_body, is_body_end
from autofunc.graph.memory import written

Node = fx.Node

Outline = tuple[Any, ...]
"""What a graph does outside the first and last runs of its loops; empty if it has no loops."""

_MOST_COMPARED = 4096  # elements of a constant


def is_left_out(index: int, count: int) -> bool:
    """True for the first and the last of `count` runs."""
    return index in (0, count - 1)


def outline(graph: fx.Graph, constants: Mapping[Node, Tensor]) -> Outline:
    """Return what a graph does, as plain data to compare with an export that skips first and last runs.

    Args:
        graph: of an export, with the marks of its loops.
        constants: values of its placeholders that are constants.
    """
    if not any(is_body(node) for node in graph.nodes):
        return ()
    found: list[Any] = []
    names: dict[Node, Any] = {}
    left_out: list[bool] = []  # of the runs around a node
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = _constant(constants[node]) if node in constants else node.name
            continue
        if is_body(node):
            left_out.append(is_left_out(node.args[1], node.args[0].meta["val"].shape[0]))
        if not any(left_out):
            names[node] = len(found)
            given = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda arg: _named(arg, names))
            found.append((node.op, str(node.target), repr(given)))
        elif written(node):
            names[node] = names[written(node)[0]]
        else:
            names[node] = "made in a skipped run"
        if is_body_end(node):
            left_out.pop()
    return tuple(found)


def _named(argument: Any, names: Mapping[Node, Any]) -> Any:
    return ("node", names[argument]) if isinstance(argument, Node) else argument


def _constant(value: Tensor) -> str:
    content = value.detach().flatten()[:_MOST_COMPARED].tolist() if value.numel() else []
    return f"{value.dtype} {tuple(value.shape)} {content}"
