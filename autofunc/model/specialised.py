"""A model for microbatches of one signature, and parameters of known dtypes: nothing is left to find out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autofunc.fingerprint import Fingerprint
from autofunc.model.cut_points import CutPoints
from autofunc.model.state import State, StatefulFunction

LayerFunction = Callable[[Mapping[str, Any], Any, Any], Any]
"""`function(params, x, entries) -> x`: `params` are the layer's nested dicts, `entries` what `Specialised.share` gave."""


@dataclass(frozen=True)
class Specialised:
    """What `Model.specialise` gives; plain data and pure functions.

    Args:
        functions: by the layer's name, of those without state.
        share: `share(layers, microbatch) -> entries`: the microbatch as some layers that run one after the other see it,
            with what they compute from it together.
        programs: `programs(layers)` is what computes `share` for them, and then each of them: what fingerprints are made
            from.
        cut_points: where a stage may begin.
        stateful: by the layer's name, of those with state.
    """

    functions: Mapping[str, LayerFunction]
    share: Callable[[Sequence[str], Mapping[str, Any]], Any]
    programs: Callable[[Sequence[str]], Sequence[Any]]
    cut_points: CutPoints
    stateful: Mapping[str, StatefulFunction] = field(default_factory=dict)

    def layer(
        self, name: str, params: Mapping[str, Any], x: Any, entries: Any, states: Mapping[str, State]
    ) -> tuple[Any, Mapping[str, State]]:
        """Run one layer.

        Args:
            name: of the layer.
            params: its parameters as nested dicts.
            x: what the layer before returned; None for the first.
            entries: what `share` gave.
            states: by layer: the state of those that have one.

        Returns:
            x, and the states with this layer's as it is now.
        """
        if name not in self.stateful:
            return self.functions[name](params, x, entries), states
        x, state = self.stateful[name](params, x, entries, states[name])
        return x, {**states, name: state}

    def run(
        self,
        layers: Sequence[str],
        bound: Mapping[str, Mapping[str, Any]],
        x: Any,
        microbatch: Mapping[str, Any],
        states: Mapping[str, State] | None = None,
    ) -> tuple[Any, Mapping[str, State]]:
        """Run some layers in order.

        Args:
            layers: names of layers that follow each other.
            bound: by layer: its parameters as nested dicts.
            x: what the layer before returned; None for the first.
            microbatch: of the signature this was specialised for; "key" is a tensor or None.
            states: by layer: the state of those that have one.

        Returns:
            x, and the states as they are now.
        """
        entries, after = self.share(layers, microbatch), states or {}
        for name in layers:
            x, after = self.layer(name, bound[name], x, entries, after)
        return x, after

    def fingerprints(self, layers: Sequence[str], labels: Iterable[str]) -> tuple[Any, ...]:
        """A hashable for what `layers` share, and one for each of them: equal where the computation is.

        Args:
            layers: names of layers that follow each other.
            labels: what stands for the name of each: a number, or the name itself where it matters.
        """
        shared, *programs = self.programs(layers)
        named = zip(layers, labels, programs, strict=True)
        return Fingerprint().of(shared), *(Fingerprint(name, label).of(program) for name, label, program in named)
