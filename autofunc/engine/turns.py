"""Where two interleaved pieces take turns: each runs while an exchange of the other is under way.

The order in which exchanges begin depends only on how many each piece has, so ranks that take part in
them agree on it, even if their other computations differ. The exchanges of both are mixed as evenly as possible.
Between two in a row of one piece, the other does a share of its work, measured by the cost of its operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from autofunc.engine.residuals import cost_of
from autofunc.graph.exchanges import is_exchange

Node = fx.Node


class Turns(NamedTuple):
    """For each of two pieces, the indices of the nodes before which it stops; and whether the second begins."""

    stops: tuple[list[int], list[int]]
    second_begins: bool


def turns_of(first: Sequence[Node], second: Sequence[Node]) -> Turns:
    """Compute the turns of two pieces, each given as its nodes in order.

    The runner switches pieces at each stop; when one ends, it runs the rest of the other.
    """
    both = (first, second)
    exchanges = [[number for number, node in enumerate(nodes) if is_exchange(node)] for nodes in both]
    order = _merged(len(exchanges[0]), len(exchanges[1]))
    stops: tuple[list[int], list[int]] = ([], [])
    shares = [0, 0]  # per piece, how many turns end before its next exchange
    after = [0, 0]  # its first node after the last exchange

    def divide(side: int, end: int, parts: int) -> None:
        stops[side].extend(_divided(both[side][after[side] : end], parts, after[side]))

    remaining = [iter(each) for each in exchanges]
    for place, side in enumerate(order):
        exchange = next(remaining[side])
        divide(side, exchange, shares[side] + 1)  # it begins in the last of these turns, however short the earlier ones
        stops[side].append(exchange + 1)
        shares[side], after[side] = 0, exchange + 1
        if order[place + 1 : place + 2] == [side]:
            shares[1 - side] += 1
    for side in (0, 1):
        if shares[side]:
            divide(side, len(both[side]), shares[side] + 1)
    return Turns(stops, order[:1] == [1])


def _merged(first: int, second: int) -> list[int]:
    """Merge two numbers of exchanges as evenly as possible, the first before the second; return whose each is."""
    places = [((number + 1) * (second + 1), 0) for number in range(first)]
    places += [((number + 1) * (first + 1), 1) for number in range(second)]
    return [side for _, side in sorted(places)]


def _divided(nodes: Sequence[Node], parts: int, offset: int) -> list[int]:
    """Cut nodes into parts of equal cost; return where, as indices that count from `offset`."""
    costs = [cost_of([node]) for node in nodes]
    total, done, cuts = sum(costs), 0.0, list[int]()
    for number, cost in enumerate(costs):
        while len(cuts) < parts - 1 and done >= total * (len(cuts) + 1) / parts:
            cuts.append(offset + number)
        done += cost
    return cuts + [offset + len(nodes)] * (parts - 1 - len(cuts))
