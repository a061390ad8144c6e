"""The input and the answer of a rule: an operator with the layouts of its operands, and its replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx

from autofunc.graph.schema import arguments, is_operator, schema_of
from autofunc.spreading.layouts import FULL, Cut, Layout

Node = fx.Node


@dataclass(frozen=True)
class Want:
    """An argument: a value, and the layout to take it in. FULL: each rank uses it with its part of other operands."""

    node: Node
    layout: Layout


@dataclass(frozen=True)
class Outcome:
    """The replacement of an operator whose operands are not all full: a call on what each rank holds.

    Args:
        layout: of the result; a tuple for several results.
        target: the function to call.
        args: with `Want` in place of values; a bare node is taken full.
        kwargs: likewise.
        ranges: (start, end) of each result along the operand's cut dim, if results are parts of it.
    """

    layout: Layout | tuple[Layout, ...]
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def wants(self) -> list[Want]:
        """All its operands."""
        return list(_wants((self.args, tuple(self.kwargs.values()))))


class Span(NamedTuple):
    """The part of a parameter's cut dim that a value was computed from."""

    name: str  # of the parameter
    start: int
    size: int

    def within(self, start: int, end: int, whole: int) -> Span:
        """Return the span of a range of the value's cut dim, whose size is `whole`."""
        if any(place * self.size % whole for place in (start, end)):
            return self
        return Span(self.name, self.start + start * self.size // whole, (end - start) * self.size // whole)


class Borders(Exception):
    """An operand would have to be cut in parts that begin at these offsets along its dim."""

    def __init__(self, node: Node, places: Sequence[int]) -> None:
        super().__init__(node.name)
        self.node, self.places = node, tuple(places)


class Undivided(Exception):
    """An operand would have to be cut along a dim of `number` places, which ranks cannot share equally."""

    def __init__(self, node: Node, number: int) -> None:
        super().__init__(node.name)
        self.node, self.number = node, number


class Operation:
    """An operator as a rule sees it.

    Args:
        node: of the whole graph, whose values have full sizes.
        layouts: of its operands.
        size: number of ranks along the axis.
        axis: its name.
    """

    def __init__(self, node: Node, layouts: Mapping[Node, Any], size: int, axis: str) -> None:
        self.node, self.size, self.axis, self._layouts = node, size, axis, layouts
        self.given: dict[str, Any] = arguments(node) if is_operator(node) else dict(enumerate(node.args))  # type: ignore[arg-type]

    def layout(self, x: Any) -> Layout:
        """Return the layout of an operand; numbers and the like are full."""
        found: Layout = self._layouts.get(x, FULL) if isinstance(x, Node) else FULL
        return found

    def cut(self, x: Any) -> Cut | None:
        """Return the cut of an operand; None if it is not cut."""
        found = self.layout(x)
        return found if isinstance(found, Cut) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The full shape of the result."""
        return shape_of(self.node)

    def tensors(self) -> Iterator[Node]:
        """Yield the operands that are tensors."""
        yield from (each for each in self.node.all_input_nodes if isinstance(each.meta.get("val"), Tensor))

    def becomes(self, layout: Layout | tuple[Layout, ...], /, **changed: Any) -> Outcome:
        """Return the same operator with some arguments replaced, by name."""
        schema = schema_of(self.node)
        assert schema is not None
        left = dict(changed)
        args = tuple(left.pop(name, value) for name, value in zip(schema.names, self.node.args, strict=False))
        kwargs = {name: left.pop(name, value) for name, value in self.node.kwargs.items()}
        return Outcome(layout, self.node.target, args, {**kwargs, **left})  # type: ignore[arg-type]


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the full shape of a value; () for a number."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


Rule = Callable[[Operation], "Outcome | None"]
"""None if the operator cannot work on parts: its operands are made full."""


def _wants(argument: Any) -> Iterator[Want]:
    if isinstance(argument, Want):
        yield argument
    elif isinstance(argument, Node):
        yield Want(argument, FULL)
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from _wants(part)
