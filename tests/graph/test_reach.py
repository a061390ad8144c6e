"""What leads to what: compared with a plain search over a graph with a diamond, views and several results."""

from __future__ import annotations

from operator import getitem
from typing import NamedTuple

import pytest
import torch
from torch import fx

from autofunc.graph.reach import ancestors, ancestors_within, descendants, frontier, reachable

aten = torch.ops.aten


class Diamond(NamedTuple):
    """p, x -> h = x @ p.t(); a = tanh(h), (values, indices) = max(h); y = a + values; z = y[0]."""

    graph: fx.Graph
    p: fx.Node
    x: fx.Node
    view: fx.Node
    h: fx.Node
    a: fx.Node
    largest: fx.Node
    values: fx.Node
    indices: fx.Node
    y: fx.Node
    z: fx.Node


@pytest.fixture
def d() -> Diamond:
    graph = fx.Graph()
    p, x = graph.placeholder("p"), graph.placeholder("x")
    view = graph.call_function(aten.t.default, (p,))
    h = graph.call_function(aten.mm.default, (x, view))
    a = graph.call_function(aten.tanh.default, (h,))
    largest = graph.call_function(aten.max.dim, (h, 0))
    values, indices = (graph.call_function(getitem, (largest, number)) for number in (0, 1))
    y = graph.call_function(aten.add.Tensor, (a, values))
    z = graph.call_function(aten.select.int, (y, 0, 0))
    graph.output((z, indices))
    return Diamond(graph, p, x, view, h, a, largest, values, indices, y, z)


def test_ancestors(d: Diamond) -> None:
    assert ancestors([d.a]) == {d.a, d.h, d.x, d.view, d.p}
    assert ancestors([d.z], [d.h]) == {d.z, d.y, d.a, d.values, d.largest}
    assert ancestors([d.z], [d.a, d.values]) == {d.z, d.y}
    assert ancestors([d.h], [d.h]) == set()


def test_ancestors_within(d: Diamond) -> None:
    region = {d.h, d.largest, d.values, d.indices, d.y}
    # the other result of max comes with the one that is asked for; what lies outside leads nowhere
    assert ancestors_within([d.y], region) == region
    assert ancestors_within([d.z], region) == set()
    assert ancestors_within([d.values], {d.values}) == {d.values}


def test_descendants(d: Diamond) -> None:
    assert descendants(d.graph, [d.a]) == {d.y, d.z}
    assert descendants(d.graph, [d.p]) == {d.view, d.h, d.a, d.largest, d.values, d.indices, d.y, d.z}
    assert descendants(d.graph, [d.a, d.y]) == {d.z}  # a source is none, though it reads another
    assert descendants(d.graph, []) == set()


def test_reachable(d: Diamond) -> None:
    assert reachable([d.z], lambda node: node.all_input_nodes[:1]) == {d.z, d.y, d.a, d.h, d.x}
    ring = {d.p: d.x, d.x: d.h, d.h: d.p}
    assert reachable([d.p], lambda node: [ring[node]]) == set(ring)


def test_frontier(d: Diamond) -> None:
    assert frontier([d.z], {d.z, d.y}) == [d.a, d.values]
    assert frontier([d.z], set()) == [d.z]  # a view of what was computed holds its memory: it is kept as it is
    assert frontier([d.y, d.a], {d.y}) == [d.a, d.values]
    # the view of a parameter is made again: what is needed is the parameter
    assert frontier([d.h], {d.h}) == [d.p, d.x]
    assert frontier([d.indices, d.y], {d.y, d.values, d.indices, d.largest}) == [d.h, d.a]


def test_frontier_has_no_constants(d: Diamond) -> None:
    with d.graph.inserting_before(d.y):
        constant = d.graph.get_attr("constant")
        shifted = d.graph.call_function(aten.add.Tensor, (d.h, constant))
    assert frontier([shifted], {shifted}) == [d.h]
