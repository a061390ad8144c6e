"""Which nodes share memory and which write to it; compared with the memory of real tensors."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from autofunc.fake import fake_mode
from autofunc.graph.memory import aliased, base_of, is_copied_first, is_view, storage_bytes, written
from autofunc.graph.trace import trace

aten = torch.ops.aten


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.Graph:
    """The graph of a function of tensors of these shapes."""
    with fake_mode():
        return trace(function, *(torch.empty(shape) for shape in shapes)).graph


def find(graph: fx.Graph, target: Any) -> fx.Node:
    return next(node for node in graph.nodes if node.target is target)


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view(-1),
    "transposed twice": lambda x: x.t().unsqueeze(0),
    "expanded": lambda x: x[:1].expand(4, 6),
    "one of a split": lambda x: x.split(2)[1],
    "one of chunks": lambda x: x.chunk(2, 1)[0][1:],
    "one row": lambda x: x.unbind(0)[2],
    "unsafe view": lambda x: aten._unsafe_view(x, [6, 4]),
    "detached": lambda x: x.detach(),
    "copied": lambda x: x.clone(),
    "computed": lambda x: x.view(-1) * 2,
    "one of several results": lambda x: x.max(0).values,
    "indexed": lambda x: x[torch.tensor([1, 0])],
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_base_is_whose_memory_it_is(made: Callable[[Tensor], Tensor]) -> None:
    graph = traced(made, (4, 6))
    (given,) = (node for node in graph.nodes if node.op == "placeholder")
    (result,) = graph.output_node().args
    x = torch.zeros(4, 6)
    shares = made(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert (base_of(result) is given) is shares


def test_views_of_several() -> None:
    graph = traced(lambda x: x.split([1, 3])[0], (4, 6))
    split, part = find(graph, aten.split_with_sizes.default), find(graph, getitem)
    assert aliased(part) is split and base_of(part).op == "placeholder"
    assert is_view(split) and is_view(part)
    several = traced(lambda x: x.max(0).values, (4, 6))
    part = find(several, getitem)
    assert aliased(part) is None and base_of(part) is part and not is_view(part)


def test_in_place_is_no_view_but_stays_where_it_is() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    sum_ = graph.call_function(aten.add_.Tensor, (graph.call_function(aten.t.default, (x,)), 1))
    assert base_of(sum_) is x and not is_view(sum_)


def test_functions_of_python_have_memory_of_their_own() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.t, (graph.placeholder("x"),))
    assert aliased(node) is None and base_of(node) is node and not is_view(node) and written(node) == []


def test_storage_bytes() -> None:
    graph = traced(lambda x: x[1].view(2, 3), (4, 6))
    (result,) = graph.output_node().args
    assert storage_bytes(result) == 4 * 6 * 4  # all of what it is a view of
    chosen = traced(lambda x: x[x > 0], (4, 6))
    (result,) = chosen.output_node().args
    assert storage_bytes(result) is None  # only the data say how many


Two = tuple[fx.Graph, fx.Node, fx.Node]


@pytest.fixture
def two() -> Two:
    graph = fx.Graph()
    return graph, graph.placeholder("x"), graph.placeholder("y")


def test_writes_in_place(two: Two) -> None:
    graph, x, y = two
    assert written(graph.call_function(aten.add_.Tensor, (x, y))) == [x]
    assert written(graph.call_function(aten.copy_.default, (x, y))) == [x]
    assert written(graph.call_function(aten.add.Tensor, (x, y))) == []
    assert written(graph.call_function(aten.detach_.default, (x,))) == []


def test_writes_to_out(two: Two) -> None:
    graph, x, y = two
    assert written(graph.call_function(aten.add.out, (x, x), {"out": y})) == [y]
    node = graph.call_function(aten.max.dim_max, (x, 0), {"max": y, "max_values": x})
    assert written(node) == [y, x]
    assert base_of(graph.call_function(aten.add.out, (x, x), {"out": y})) is y


def test_writes_to_lists(two: Two) -> None:
    graph, x, y = two
    assert written(graph.call_function(aten._foreach_add_.Scalar, ([x, y], 1.0))) == [x, y]
    assert written(graph.call_function(aten._foreach_add_.List, ([x], [y]))) == [x]
    assert written(graph.call_function(aten._foreach_add.List, ([x], [y]))) == []


def test_writes_through_views(two: Two) -> None:
    graph, x, y = two
    row = graph.call_function(aten.select.int, (graph.call_function(aten.t.default, (x,)), 0, 1))
    (target,) = written(graph.call_function(aten.mul_.Tensor, (row, y)))
    assert target is row and base_of(target) is x
    part = graph.call_function(getitem, (graph.call_function(aten.unbind.int, (x,)), 0))
    (target,) = written(graph.call_function(aten.mul_.Tensor, (part, y)))
    assert base_of(target) is x


@pytest.mark.parametrize(
    ("operator", "rest"),
    [
        (aten.batch_norm.default, (0.1, 1e-5, False)),
        (aten.native_batch_norm.default, (0.1, 1e-5)),
        (aten.instance_norm.default, (0.1, 1e-5, False)),
    ],
)
def test_writes_to_running_statistics(operator: Any, rest: tuple[Any, ...], two: Two) -> None:
    graph, x, y = two
    assert written(graph.call_function(operator, (x, None, None, y, x, True, *rest))) == [y, x]
    assert written(graph.call_function(operator, (x, None, None, y, x, False, *rest))) == []
    assert written(graph.call_function(operator, (x, None, None, None, None, True, *rest))) == []


@pytest.mark.parametrize(
    ("operator", "real"),
    [
        (aten.native_batch_norm.default, (0.1, 1e-5)),
        (aten.batch_norm.default, (0.1, 1e-5, False)),
        (aten.instance_norm.default, (0.1, 1e-5, False)),
    ],
)
def test_torch_does_write_there(operator: Any, real: tuple[Any, ...]) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    operator(torch.randn(4, 3, 5) + 1, None, None, mean, var, True, *real)
    assert mean.ne(0).all() and var.ne(1).any()


def test_constants_that_are_copied_first() -> None:
    graph = fx.Graph()
    constant = graph.get_attr("constant")
    copied = graph.call_function(aten.lift_fresh_copy.default, (constant,))
    assert is_copied_first(constant) and base_of(copied) is copied
    graph.call_function(aten.add_.Tensor, (constant, 1))
    assert not is_copied_first(constant)
