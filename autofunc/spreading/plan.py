"""The plan by which the ranks of an axis share a forward: which parameters are cut, and in what parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from autofunc.errors import MeshError, divisors
from autofunc.graph.lines import line_of
from autofunc.spreading.chains import undivided
from autofunc.spreading.layouts import FULL, Cut
from autofunc.spreading.operation import shape_of
from autofunc.spreading.propagate import Propagation, Whole
from autofunc.spreading.sharing import Sharing

Node = fx.Node
_ROUNDS = 32


@dataclass(frozen=True)
class AxisPlan:
    """How the ranks of an axis share a forward.

    Args:
        axis: its name.
        size: number of ranks.
        cuts: parameter name -> its cut; every rank holds all others whole.
        terms: names of whole parameters of whose gradients each rank has a term.
        sequence: True if the stream between blocks is cut along the tokens.
        source: of the table, in words.
        notes: on what is not cut, in words.
        by_layer: True if layers are functions, cut one at a time by a table rather than by a graph of the whole.
    """

    axis: str
    size: int
    cuts: Mapping[str, Cut]
    terms: frozenset[str]
    sequence: bool
    source: str
    notes: tuple[str, ...] = ()
    by_layer: bool = False

    def described(self) -> list[str]:
        """Return the table as lines; parameters that differ only in their layer's number share one."""
        alike: dict[str, tuple[Cut, int]] = {}
        for name, cut in self.cuts.items():
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            alike[pattern] = cut, alike.get(pattern, (cut, 0))[1] + 1
        lines = [
            f"  {pattern}: dim {cut.dim}" + (f", in parts of {_counted(cut.parts)}" if len(cut.parts) > 1 else "")
            + (f" ({count} parameters)" if count > 1 else "")
            for pattern, (cut, count) in alike.items()
        ]  # fmt: skip
        return [f"cut over {self.size} {self.axis} ranks, by {self.source}:", *lines, *self.notes]

    def __hash__(self) -> int:
        return hash((self.axis, self.size, tuple(self.cuts.items()), self.terms, self.sequence))


def settled(whole: Whole, wanted: Mapping[str, int], size: int, axis: str, *, sequence: bool, source: str) -> AxisPlan:
    """Return the plan that cuts parameters along these dims, fused weights in the parts that the graph splits them into.

    Raises:
        MeshError: if the number of ranks does not divide something.
    """
    shapes = {name: shape_of(node) for node, name in whole.params.items()}
    cuts = {name: Cut(dim, (shapes[name][dim],)) for name, dim in wanted.items() if name in shapes}
    left: dict[str, tuple[int, object]] = {}
    for _ in range(_ROUNDS):
        for name, cut in cuts.items():
            if not cut.fits(size):
                raise _uneven(name, shapes[name], cut, size)
        found = Propagation(whole, cuts, size, axis, sequence=sequence).run()
        if not found.borders and not found.undivided:
            break
        for name, places in found.borders.items():
            cuts[name] = cuts[name].with_borders(places)
        for name, why in found.undivided.items():
            left[name] = why
            cuts.pop(name, None)
    unfed = [node for node in found.outcomes if _is_unfed(found, node)]
    if left and (unfed or not cuts):
        name, (number, node) = next(iter(left.items()))
        raise undivided(size, number, name, node)  # type: ignore[arg-type]
    shared = Sharing(found).shared
    terms = frozenset(name for node, name in whole.params.items() if node in shared)
    notes = [
        f"{name} is whole on every rank: its {number} heads do not divide by {size}" for name, (number, _) in left.items()
    ]
    whole_on_all = "gathers its operands and is computed whole on every rank"
    notes += [f"{node.target} {whole_on_all}: {line_of(node)}" for node in _gathering(found)]
    return AxisPlan(axis, size, cuts, terms, sequence, source, tuple(dict.fromkeys(notes)))


def _gathering(found: Propagation) -> list[Node]:
    """Return the operators that read values cut like weights, but have no rule for parts."""

    def is_cut(node: Node) -> bool:
        return isinstance(found.layout(node), Cut) and bool(found.spans(node))

    return [node for node in found.made_full if any(map(is_cut, node.all_input_nodes))]


def _counted(parts: tuple[int, ...]) -> str:
    """Return `8, 8, 16`, or `3 x 64` for equal parts."""
    return f"{len(parts)} x {parts[0]}" if len(set(parts)) == 1 else ", ".join(map(str, parts))


def _is_unfed(found: Propagation, node: object) -> bool:
    """True if a product is cut along its input dim, but the input is not."""
    outcome = found.outcomes[node]  # type: ignore[index]
    weights = [want for want in outcome.wants if want.node in found.whole.params and isinstance(want.layout, Cut)]
    others = [want for want in outcome.wants if want.node not in found.whole.params and isinstance(want.layout, Cut)]
    return bool(weights) and any(found.layout(want.node) is FULL for want in others)


def _uneven(name: str, shape: tuple[int, ...], cut: Cut, size: int) -> MeshError:
    number = next(part for part in cut.parts if part % size)
    part = f"a part of {number} of " if len(cut.parts) > 1 else ""
    return MeshError(
        f"tp={size} does not divide {part}dim {cut.dim} of parameter {name!r}, which has the shape {shape}; sizes that do: "
        f"{', '.join(divisors(number, 64))}"
    )
