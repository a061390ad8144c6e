"""Derive a table from a graph: its products form chains, which ranks compute in parts.

A chain begins with products cut along their output, continues elementwise or by heads, and ends in a product cut along its
input, or in a loss over the vocabulary. Products that one operator combines (queries, keys and values; a gate and the
values it gates) belong to one chain.

Source: Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3, which does this by hand for one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import fx

from autofunc.errors import MeshError, divisors
from autofunc.graph.lines import line_of
from autofunc.graph.reach import reachable
from autofunc.spreading.layouts import FULL, TERMS, Cut
from autofunc.spreading.operation import shape_of
from autofunc.spreading.propagate import Whole, is_differentiable
from autofunc.spreading.sides import Followed, Product, products_of

Node = fx.Node
_ROUNDS = 32
_SMALL = 8  # a chain exchanges at least this many times more anyway


def derived_cuts(whole: Whole, size: int, axis: str) -> tuple[dict[str, int], list[str]]:
    """Return parameter name -> the dim that ranks cut, and notes on parameters left whole because they do not divide.

    Raises:
        MeshError: if a weight would be cut by heads whose number does not divide.
    """
    chains = _Chains(whole, size, axis)
    for product in chains.products.values():
        if product.weight not in chains.cuts and product.weight not in chains.tried:
            chains.grow(product)
    for name, (number, node) in chains.refused.items():
        raise undivided(size, number, name, node)
    return {**chains.cuts, **dict(chains.vocabularies())}, chains.uneven


class _Chains:
    def __init__(self, whole: Whole, size: int, axis: str) -> None:
        self.whole, self.size, self.axis = whole, size, axis
        self.positions = {node: position for position, node in enumerate(whole.nodes)}
        self.products = products_of(whole, self.positions, axis)
        self._nodes = {name: node for node, name in whole.params.items()}
        self.cuts: dict[str, int] = {}
        self.tried: set[str] = set()  # weights that begin no chain
        self.uneven: list[str] = []
        self.refused: dict[str, tuple[int, Node]] = {}  # weights that would begin one if their output divided
        self._heads: set[int] = set()  # sizes of vocabularies that are cut

    def grow(self, first: Product) -> None:
        """Add the chain that begins with a product, if there is one."""
        self.tried.add(first.weight)
        cuts, left_whole, borders = self._of(first), set[str](), dict[str, set[int]]()
        for _ in range(_ROUNDS):
            uneven = self._uneven(cuts, borders)
            if uneven is not None:
                self.uneven.append(uneven)
                return
            followed = Followed(self.whole, self.positions, self._cut(cuts, borders), self.size, self.axis)
            found = followed.found
            if found.borders:
                for name, places in found.borders.items():
                    borders.setdefault(name, set()).update(places)
                continue
            if found.undivided:
                if first.weight in found.undivided:  # another chain may use it whole
                    self.refused[first.weight] = found.undivided[first.weight]
                    return
                left_whole |= found.undivided.keys()
                cuts = {name: dim for name, dim in cuts.items() if name not in left_whole}
                continue
            more = self._more(first, followed, cuts, left_whole)
            if more is None:
                return
            if not more:
                self.cuts.update(cuts)
                self.tried |= left_whole
                self.refused = {name: why for name, why in self.refused.items() if name not in left_whole}
                if self._ends_in_logits(followed):
                    self._heads.update(shape_of(self._nodes[name])[0] for name in cuts)
                return
            cuts |= more

    def _of(self, product: Product) -> dict[str, int]:
        return {product.weight: product.out} | ({product.bias: 0} if product.bias is not None else {})

    def _cut(self, cuts: dict[str, int], borders: dict[str, set[int]]) -> dict[str, Cut]:
        sizes = {name: shape_of(self._nodes[name])[dim] for name, dim in cuts.items()}
        return {name: Cut(dim, (sizes[name],)).with_borders(borders.get(name, ())) for name, dim in cuts.items()}

    def _uneven(self, cuts: dict[str, int], borders: dict[str, set[int]]) -> str | None:
        found = self._cut(cuts, borders).items()
        return next((left_whole(name, cut, self.size) for name, cut in found if not cut.fits(self.size)), None)

    def _more(
        self, first: Product, followed: Followed, cuts: dict[str, int], left_whole: set[str]
    ) -> dict[str, int] | None:  # fmt: skip
        """Return what else must be cut to close the chain; None if it cannot be closed."""
        more: dict[str, int] = {}
        for node in followed.visited:
            found, product = followed.found, self.products.get(node)
            if product is not None and found.layout(node) is TERMS and product.weight not in cuts:
                more[product.weight] = product.inner  # each rank reads only a part, so it need hold no more
                continue
            if node in found.made_full:
                if product is None or product.weight in cuts | self.cuts or product.weight in left_whole:
                    return None
                more |= self._of(product) if product.bias in cuts else {product.weight: product.inner}
            for want in found.outcomes[node].wants if node in found.outcomes else ():
                if isinstance(want.layout, Cut) and found.layout(want.node) is FULL:
                    makers = self._makers(want.node)
                    if any(maker.weight in self.cuts for maker in makers):
                        return None
                    for maker in makers:
                        if maker.weight not in left_whole:
                            more |= {name: dim for name, dim in self._of(maker).items() if name not in cuts}
            if found.layout(node) is TERMS and product is None and not _embeds(node) and not _is_small(node, first.node):
                return None  # a sum over the cut dim, as large as the sum at a chain's end
        return more

    def _makers(self, node: Node) -> list[Product]:
        """Return the nearest products that a value is computed from."""
        makers, waiting, seen = list[Product](), [node], set[Node]()
        while waiting:
            each = waiting.pop()
            if each in seen or each in self.whole.params or each not in self.whole.weighted or not is_differentiable(each):
                continue
            seen.add(each)
            product = self.products.get(each)
            if product is not None:
                makers.append(product)
                continue
            waiting += each.all_input_nodes
        return makers

    def _ends_in_logits(self, followed: Followed) -> bool:
        """True if the chain's output goes to a loss, or is returned for one."""
        found = followed.found
        return any(
            node in found.outcomes and (found.layout(node) is FULL or node in self.whole.kept) for node in followed.visited
        )

    def _is_given(self, ids: Any) -> bool:
        """True if indices come from the batch, like tokens; False if they are counted, like positions."""
        return not reachable([ids], lambda node: node.all_input_nodes).isdisjoint(self.whole.inputs)

    def vocabularies(self) -> Iterator[tuple[str, int]]:
        """Yield the embeddings of a vocabulary whose logits are cut."""
        for node, name in self.whole.params.items():
            users = [user for user in node.users if user in self.positions]
            given = users and all(_embeds(user) and self._is_given(user.args[1]) for user in users)
            if given and name not in self.cuts and shape_of(node)[0] in self._heads:
                yield name, 0


def _is_small(node: Node, beside: Node) -> bool:
    """True if exchanging a value costs little next to another: one number per token, as in a norm over all heads."""
    return prod(shape_of(node)) * _SMALL <= prod(shape_of(beside))


def _embeds(node: Node) -> bool:
    return node.target is torch.ops.aten.embedding.default


def left_whole(name: str, cut: Cut, size: int) -> str:
    """Describe a parameter left whole because it does not divide."""
    number = next(part for part in cut.parts if part % size)
    fitting = ", ".join(divisors(number, 64))
    return f"{name} is whole on every rank: {size} does not divide {number}, in its dim {cut.dim}; sizes that do: {fitting}"


def undivided(size: int, number: int, weight: str, node: Node) -> MeshError:
    """Return the error about heads that do not divide."""
    fitting = ", ".join(divisors(number))
    return MeshError(
        f"tp={size} does not divide {number}, the number of heads into which the output of {weight!r} is split "
        f"({line_of(node)}); sizes that do: {fitting}"
    )
