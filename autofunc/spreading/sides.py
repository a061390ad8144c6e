"""Find which dim of a weight is a product's output dim, and which the input dim that it sums over."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from torch import fx

from autofunc.graph.schema import arguments, is_operator
from autofunc.spreading.layouts import FULL, TERMS, Cut
from autofunc.spreading.operation import shape_of
from autofunc.spreading.propagate import Propagation, Whole

Node = fx.Node


@dataclass(frozen=True)
class Product:
    """A product with a weight."""

    node: Node
    weight: str  # name
    out: int  # dim of the weight
    inner: int
    bias: str | None  # name


class Followed:
    """The effect of cutting some parameters, followed only as far as values are cut."""

    def __init__(self, whole: Whole, positions: dict[Node, int], cuts: dict[str, Cut], size: int, axis: str) -> None:
        self.found = Propagation(whole, cuts, size, axis)
        waiting = [positions[user] for node in self.found.layouts for user in node.users if user in positions]
        heapify(waiting)
        done: set[int] = set()
        self.visited: list[Node] = []
        while waiting:
            position = heappop(waiting)
            if position in done:
                continue
            done.add(position)
            node = whole.nodes[position]
            self.visited.append(node)
            self.found.visit(node)
            if self.found.layout(node) not in (FULL, TERMS):
                for user in node.users:
                    if user in positions:
                        heappush(waiting, positions[user])


def products_of(whole: Whole, positions: dict[Node, int], axis: str) -> dict[Node, Product]:
    """Return all products with weights, in order."""
    found: dict[Node, Product] = {}
    for node, name in whole.params.items():
        shape = shape_of(node)
        if len(shape) < 2:
            continue
        sides: dict[Node, dict[str, int]] = {}
        for dim in range(len(shape)):
            for product, side in _first_products(whole, positions, node, dim):
                sides.setdefault(product, {})[side] = dim
        for product, each in sides.items():
            if each.keys() == {"out", "inner"}:
                found[product] = Product(product, name, each["out"], each["inner"], _bias_of(whole, product, node))
    return dict(sorted(found.items(), key=lambda item: positions[item[0]]))


def _first_products(whole: Whole, positions: dict[Node, int], weight: Node, dim: int) -> list[tuple[Node, str]]:
    """Return the products that a weight reaches through views and casts, each with the side that a dim is of it."""
    cut, name = Cut(dim, (shape_of(weight)[dim],)), whole.params[weight]
    followed, found = _followed(whole, positions, weight, cut)
    while not followed.borders.get(name, set()) <= {*cut.borders}:  # products read parts of it
        cut = cut.with_borders(followed.borders[name])
        followed, found = _followed(whole, positions, weight, cut)
    return found


def _followed(
    whole: Whole, positions: dict[Node, int], weight: Node, cut: Cut
) -> tuple[Propagation, list[tuple[Node, str]]]:  # fmt: skip
    followed = Propagation(whole, {whole.params[weight]: cut}, 1, axis="")
    found, waiting = list[tuple[Node, str]](), [user for user in weight.users if user in positions]
    while waiting:
        node = waiting.pop()
        followed.visit(node)
        layout = followed.layout(node)
        if _is_product(node):
            if layout is TERMS:
                found.append((node, "inner"))
            elif isinstance(layout, Cut) and layout.dim == len(shape_of(node)) - 1:
                found.append((node, "out"))
        elif isinstance(layout, (Cut, tuple)) and len(node.all_input_nodes) == 1:
            waiting += [user for user in node.users if user in positions]
    return followed, found


_PRODUCTS = (
    "linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "grouped_linear", "grouped_matmul", "grouped_mm_fallback",
    "_grouped_mm",
)  # fmt: skip

_BIASES = {"linear": "bias", "addmm": "self"}
"""Product -> the name of the argument it adds."""


def _is_product(node: Node) -> bool:
    return is_operator(node) and str(node.target).split(".")[1] in _PRODUCTS


def _bias_of(whole: Whole, product: Node, weight: Node) -> str | None:
    """Return the parameter of one dim that a product adds, or adds a part of; None if others read it too."""
    name = _BIASES.get(str(product.target).split(".")[1])
    node = arguments(product)[name] if name is not None else None
    while isinstance(node, Node) and node not in whole.params and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if not isinstance(node, Node) or node not in whole.params or node is weight:
        return None
    return whole.params[node] if len(shape_of(node)) == 1 and len(node.users) == 1 else None
