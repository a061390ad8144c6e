"""A model for microbatches of one signature, and parameters of known dtypes: nothing is left to find out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autofunc.fingerprint import Fingerprint
from autofunc.model.cut_points import CutPoints

LayerFunction = Callable[[Mapping[str, Any], Any, Any], Any]
"""`function(params, x, entries) -> x`: `params` are the layer's nested dicts, `entries` what `Specialised.share` gave."""


@dataclass(frozen=True)
class Specialised:
    """What `Model.specialise` gives; plain data and pure functions.

    Args:
        functions: by the layer's name.
        share: `share(layers, microbatch) -> entries`: the microbatch as some layers that run one after the other see it,
            with what they compute from it together.
        programs: `programs(layers)` is what computes `share` for them, and then each of them: what fingerprints are made
            from.
        cut_points: where a stage may begin.
    """

    functions: Mapping[str, LayerFunction]
    share: Callable[[Sequence[str], Mapping[str, Any]], Any]
    programs: Callable[[Sequence[str]], Sequence[Any]]
    cut_points: CutPoints

    def run(
        self, layers: Sequence[str], bound: Mapping[str, Mapping[str, Any]], x: Any, microbatch: Mapping[str, Any]
    ) -> Any:
        """Run some layers in order.

        Args:
            layers: names of layers that follow each other.
            bound: by layer: its parameters as nested dicts.
            x: what the layer before returned; None for the first.
            microbatch: of the signature this was specialised for; "key" is a tensor or None.
        """
        entries = self.share(layers, microbatch)
        for name in layers:
            x = self.functions[name](bound[name], x, entries)
        return x

    def fingerprints(self, layers: Sequence[str], labels: Iterable[str]) -> tuple[Any, ...]:
        """A hashable for what `layers` share, and one for each of them: equal where the computation is.

        Args:
            layers: names of layers that follow each other.
            labels: what stands for the name of each: a number, or the name itself where it matters.
        """
        shared, *programs = self.programs(layers)
        named = zip(layers, labels, programs, strict=True)
        return Fingerprint().of(shared), *(Fingerprint(name, label).of(program) for name, label, program in named)
