"""Values whose real strides differ from those that fake tensors had when the stage was captured.

Most operators compute the same numbers whatever the strides of their arguments. Some depend on the captured strides: a
`view` that would need a copy, a norm's backward that reads memory from end to end. So the first call of a piece
checks what the kernels return, and later calls copy to the captured strides exactly what an operator would misread.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from autofunc.errors import ModelError
from autofunc.graph.lines import line_of
from autofunc.graph.memory import is_all_of_its_memory, is_view
from autofunc.graph.schema import is_pointwise

Node = fx.Node

_aten = torch.ops.aten

_VIEWS = (_aten.view.default, _aten._unsafe_view.default)
_ANY_STRIDES = frozenset(
    (
        _aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default, _aten.mv.default,
        _aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim, _aten.cat.default,
        _aten.clone.default, _aten.convolution.default, _aten.convolution_backward.default,
    )
)  # fmt: skip
"""Operators, besides pointwise ones and views, whose kernels accept any strides."""


class Watch:
    """Checks the strides of all values of one call of a piece.

    Args:
        whole: nodes that must be laid out as captured, because they leave the piece.
    """

    def __init__(self, whole: Set[Node]) -> None:
        self.relaid: dict[Node, set[Node]] = {}  # by reader: arguments that it needs in their captured layout
        self.relaid_outputs: set[Node] = set()
        self._whole = whole
        self._unlike: set[Node] = set()  # nodes whose real layout differs from the captured one

    def given(self, nodes: list[Node], values: list[Tensor]) -> None:
        """Check the arguments of a piece."""
        for node, value in zip(nodes, values, strict=True):
            self._look(node, value)

    def calling(self, node: Node) -> Callable[..., Any]:
        """Return a function to call in place of a node's operator, on the values of `node.args` and `node.kwargs`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            target: Any = node.target
            unlike = [read for read in node.all_input_nodes if read in self._unlike]
            if unlike and node.target in _VIEWS:
                try:
                    value = target(*args, **kwargs)
                except RuntimeError:  # memory with these strides cannot be viewed like this
                    value = self._call(node, args, kwargs, unlike)
            elif unlike and not _reads_any_strides(node):
                value = self._call(node, args, kwargs, unlike)
            else:
                value = target(*args, **kwargs)
            self._look(node, value)
            return value

        return call

    def returning(self, node: Node) -> Callable[[Tensor], Tensor]:
        """Return a function to apply to a value that the piece returns."""

        def give(value: Tensor) -> Tensor:
            if node in self._whole and node in self._unlike:
                self.relaid_outputs.add(node)
                return laid_out(value, node)
            return value

        return give

    def _call(self, node: Node, args: Any, kwargs: Any, unlike: list[Node]) -> Any:
        """Call an operator on arguments in their captured layout."""
        if node.target is _aten.as_strided.default and not is_all_of_its_memory(node.all_input_nodes[0]):
            raise ModelError(
                f"as_strided reads memory outside of a tensor whose layout is not the captured one ({line_of(node)}); "
                "use views and indexing"
            )
        self.relaid[node] = {*unlike}
        args, kwargs = (
            _relaid(names, values, self.relaid[node]) for names, values in ((node.args, args), (node.kwargs, kwargs))
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _look(self, node: Node, value: Any) -> None:
        if isinstance(value, Tensor) and not lies_as_captured(value, node):
            self._unlike.add(node)


def lies_as_captured(value: Tensor, node: Node) -> bool:
    """Return whether a value has the strides its node was captured with; dims of size 1 and empty tensors do not count."""
    captured = node.meta.get("val")
    if not isinstance(captured, Tensor) or any(isinstance(size, torch.SymInt) for size in captured.shape):
        return True  # its size depends on data
    if value.layout != torch.strided or captured.layout != torch.strided or not value.numel():
        return True
    return all(
        one == other for one, other, size in zip(value.stride(), captured.stride(), value.shape, strict=True) if size != 1
    )


def laid_out(value: Tensor, node: Node) -> Tensor:
    """Copy a value to the strides that its node was captured with."""
    return torch.empty_strided(value.shape, node.meta["val"].stride(), dtype=value.dtype, device=value.device).copy_(value)


def _reads_any_strides(node: Node) -> bool:
    if node.target is getitem or node.target in _ANY_STRIDES or is_pointwise(node):
        return True
    return is_view(node) and node.target is not _aten.as_strided.default


def _relaid(names: Any, values: Any, relaid: Set[Node]) -> Any:
    """Copy some of the arguments to their captured layout."""
    if isinstance(names, Node):
        return laid_out(values, names) if names in relaid else values
    if isinstance(names, (list, tuple)):
        return type(values)(_relaid(name, value, relaid) for name, value in zip(names, values, strict=True))
    if isinstance(names, dict):
        return {key: _relaid(name, values[key], relaid) for key, name in names.items()}
    return values
