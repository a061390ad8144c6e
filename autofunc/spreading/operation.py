"""What a rule is asked, and what it answers: an operator, how its operands lie, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from autofunc.graph.schema import arguments, is_operator, schema_of
from autofunc.spreading.layouts import FULL, Cut, Layout

Node = fx.Node


@dataclass(frozen=True)
class Want:
    """An argument: a value, in the layout in which the operator takes it. FULL: each rank uses it with a part of others."""

    node: Node
    layout: Layout


@dataclass(frozen=True)
class Outcome:
    """What becomes of an operator whose operands are not all full: another call, on what each rank holds.

    Args:
        layout: of what it makes; one for each where it makes several.
        target: what is called.
        args: with `Want` in the places of values; a node by itself is taken full.
        kwargs: likewise.
    """

    layout: Layout | tuple[Layout, ...]
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wants(self) -> list[Want]:
        """All of its operands."""
        return list(_wants((self.args, tuple(self.kwargs.values()))))


class Borders(Exception):
    """An operand would have to be cut in parts that begin at these places along its dim."""

    def __init__(self, node: Node, places: Sequence[int]) -> None:
        super().__init__(node.name)
        self.node, self.places = node, tuple(places)


class Undivided(Exception):
    """An operand would have to be cut into a number of equal pieces along a dim that has not so many."""

    def __init__(self, node: Node, number: int) -> None:
        super().__init__(node.name)
        self.node, self.number = node, number


class Operation:
    """An operator as a rule sees it.

    Args:
        node: of the whole graph, whose values have the sizes of the whole.
        layouts: how its operands lie.
        size: number of ranks along the axis.
        axis: its name.
    """

    def __init__(self, node: Node, layouts: Mapping[Node, Any], size: int, axis: str) -> None:
        self.node, self.size, self.axis, self._layouts = node, size, axis, layouts
        self.given: dict[str, Any] = arguments(node) if is_operator(node) else dict(enumerate(node.args))  # type: ignore[arg-type]

    def layout(self, x: Any) -> Layout:
        """How an operand lies; numbers and the like are full."""
        found: Layout = self._layouts.get(x, FULL) if isinstance(x, Node) else FULL
        return found

    def cut(self, x: Any) -> Cut | None:
        """How an operand is cut, if it is."""
        found = self.layout(x)
        return found if isinstance(found, Cut) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it makes, whole."""
        return shape_of(self.node)

    def tensors(self) -> Iterator[Node]:
        """The operands that are values."""
        yield from (each for each in self.node.all_input_nodes if isinstance(each.meta.get("val"), Tensor))

    def becomes(self, layout: Layout | tuple[Layout, ...], /, **changed: Any) -> Outcome:
        """The same operator with some arguments changed, by name."""
        schema = schema_of(self.node)
        assert schema is not None
        left = dict(changed)
        args = tuple(left.pop(name, value) for name, value in zip(schema.names, self.node.args, strict=False))
        kwargs = {name: left.pop(name, value) for name, value in self.node.kwargs.items()}
        return Outcome(layout, self.node.target, args, {**kwargs, **left})  # type: ignore[arg-type]


def shape_of(node: Any) -> tuple[int, ...]:
    """Of a value, whole; of a number ()."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


Rule = Callable[[Operation], "Outcome | None"]
"""None: it cannot be done on parts, so its operands are made full."""


def _wants(argument: Any) -> Iterator[Want]:
    if isinstance(argument, Want):
        yield argument
    elif isinstance(argument, Node):
        yield Want(argument, FULL)
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from _wants(part)
