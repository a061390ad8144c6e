"""Where two pieces that run side by side take turns: each goes on while an exchange of the other is under way.

The order in which exchanges are begun follows from how many each piece has, and from nothing else: so ranks that meet in
them agree on it, even where what they compute in between differs. The exchanges of both are mixed as evenly as can be.
Where two in a row are of one piece, the other computes a part of its work between them, by what its operators cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from autofunc.engine.residuals import cost_of
from autofunc.graph.exchanges import is_exchange

Node = fx.Node


class Turns(NamedTuple):
    """For each of two pieces, before which of its nodes it stops, by number; and whether the second begins."""

    stops: tuple[list[int], list[int]]
    second_begins: bool


def turns_of(first: Sequence[Node], second: Sequence[Node]) -> Turns:
    """Work out the turns of two pieces, each given as its nodes in order.

    Whoever runs them changes from one to the other at each stop, and at the end of one goes on with what is left.
    """
    both = (first, second)
    exchanges = [[number for number, node in enumerate(nodes) if is_exchange(node)] for nodes in both]
    order = _merged(len(exchanges[0]), len(exchanges[1]))
    stops: tuple[list[int], list[int]] = ([], [])
    shares = [0, 0]  # of each piece, how many turns end before its next exchange
    after = [0, 0]  # its first node after the last exchange

    def divide(side: int, end: int, parts: int) -> None:
        stops[side].extend(_divided(both[side][after[side] : end], parts, after[side]))

    remaining = [iter(each) for each in exchanges]
    for place, side in enumerate(order):
        exchange = next(remaining[side])
        divide(side, exchange, shares[side] + 1)  # which is begun in the last of these turns, however little the others do
        stops[side].append(exchange + 1)
        shares[side], after[side] = 0, exchange + 1
        if order[place + 1 : place + 2] == [side]:
            shares[1 - side] += 1
    for side in (0, 1):
        if shares[side]:
            divide(side, len(both[side]), shares[side] + 1)
    return Turns(stops, order[:1] == [1])


def _merged(first: int, second: int) -> list[int]:
    """Which of two pieces has the next exchange, for numbers of them: as evenly as can be, the first before the second."""
    places = [((number + 1) * (second + 1), 0) for number in range(first)]
    places += [((number + 1) * (first + 1), 1) for number in range(second)]
    return [side for _, side in sorted(places)]


def _divided(nodes: Sequence[Node], parts: int, offset: int) -> list[int]:
    """Where some nodes are cut into parts of equal cost; numbers count from `offset`."""
    costs = [cost_of([node]) for node in nodes]
    total, done, cuts = sum(costs), 0.0, list[int]()
    for number, cost in enumerate(costs):
        while len(cuts) < parts - 1 and done >= total * (len(cuts) + 1) / parts:
            cuts.append(offset + number)
        done += cost
    return cuts + [offset + len(nodes)] * (parts - 1 - len(cuts))
