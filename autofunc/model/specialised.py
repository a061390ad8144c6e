"""A model specialised to microbatches of one signature and parameters of known dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autofunc.fingerprint import Fingerprint
from autofunc.model.cut_points import CutPoints
from autofunc.model.state import State, StatefulFunction

LayerFunction = Callable[[Mapping[str, Any], Any, Any], Any]
"""`function(params, x, entries) -> x`: `params` are the layer's nested dicts, `entries` come from `Specialised.share`."""


@dataclass(frozen=True)
class Specialised:
    """The result of `Model.specialise`: plain data and pure functions.

    Args:
        functions: of layers without state, by name.
        share: `share(layers, microbatch) -> entries`: the microbatch as consecutive layers see it, with the values they
            compute from it once for all.
        programs: `programs(layers)` returns what computes `share` for them, followed by each layer's program: the input of
            fingerprints.
        cut_points: where a stage may begin.
        stateful: functions of layers with state, by name.
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
            x: the previous layer's output; None for the first.
            entries: from `share`.
            states: of layers that have state, by layer.

        Returns:
            (x, states with this layer's new state).
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
        """Run consecutive layers in order.

        Args:
            layers: their names.
            bound: parameters as nested dicts, by layer.
            x: the previous layer's output; None for the first.
            microbatch: of the signature this was specialised for; "key" is a tensor or None.
            states: of layers that have state, by layer.

        Returns:
            (x, the new states).
        """
        entries, after = self.share(layers, microbatch), states or {}
        for name in layers:
            x, after = self.layer(name, bound[name], x, entries, after)
        return x, after

    def fingerprints(self, layers: Sequence[str], labels: Iterable[str]) -> tuple[Any, ...]:
        """Return a hashable for what `layers` share, then one for each of them; equal if the computations are.

        Args:
            layers: names of consecutive layers.
            labels: that stand for their names: numbers, or the names themselves where they matter.
        """
        shared, *programs = self.programs(layers)
        named = zip(layers, labels, programs, strict=True)
        return Fingerprint().of(shared), *(Fingerprint(name, label).of(program) for name, label, program in named)
