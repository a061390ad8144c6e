"""How a forward is computed by the ranks of an axis together: which parameters are cut, and in what parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from autofunc.errors import MeshError
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
        size: how many ranks.
        cuts: name of a parameter -> how it is cut; others every rank has whole.
        terms: names of those that are whole, but of whose gradients each rank has a term.
        sequence: whether the stream between blocks is cut along the tokens.
        source: where the table came from, in words.
        notes: what does not go in parts, in words.
    """

    axis: str
    size: int
    cuts: Mapping[str, Cut]
    terms: frozenset[str]
    sequence: bool
    source: str
    notes: tuple[str, ...] = ()

    def described(self) -> list[str]:
        """The table in words: a line for parameters that differ in the number of their layer alone."""
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
    """The plan for parameters that are cut along these dims: fused weights in the parts that the graph takes them apart in.

    Raises:
        MeshError: where something does not divide by the number of ranks.
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
    notes += [
        f"{node.target} is computed whole on every rank, of what is cut: {line_of(node)}" for node in _gathering(found)
    ]
    return AxisPlan(axis, size, cuts, terms, sequence, source, tuple(dict.fromkeys(notes)))


def _gathering(found: Propagation) -> list[Node]:
    """Operators on what is cut as weights are, for which no rule says what to do with parts."""

    def is_cut(node: Node) -> bool:
        return isinstance(found.layout(node), Cut) and bool(found.spans(node))

    return [node for node in found.made_full if any(map(is_cut, node.all_input_nodes))]


def _counted(parts: tuple[int, ...]) -> str:
    """`8, 8, 16`, or `3 x 64`."""
    return f"{len(parts)} x {parts[0]}" if len(set(parts)) == 1 else ", ".join(map(str, parts))


def _is_unfed(found: Propagation, node: object) -> bool:
    """Whether a product that is cut along what it adds up has an input that is not."""
    outcome = found.outcomes[node]  # type: ignore[index]
    weights = [want for want in outcome.wants if want.node in found.whole.params and isinstance(want.layout, Cut)]
    others = [want for want in outcome.wants if want.node not in found.whole.params and isinstance(want.layout, Cut)]
    return bool(weights) and any(found.layout(want.node) is FULL for want in others)


def _uneven(name: str, shape: tuple[int, ...], cut: Cut, size: int) -> MeshError:
    number = next(part for part in cut.parts if part % size)
    fitting = ", ".join(str(each) for each in range(1, min(number, 64) + 1) if number % each == 0)
    part = f"a part of {number} of " if len(cut.parts) > 1 else ""
    return MeshError(
        f"tp={size} does not divide {part}dim {cut.dim} of parameter {name!r}, which has the shape {shape}; sizes that do: "
        f"{fitting}"
    )
