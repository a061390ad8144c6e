"""A model captured from a module or a function: its layers are pieces of one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autofunc import cache, tree
from autofunc.cache import Identity
from autofunc.captured.captures import Captures
from autofunc.captured.cut import Cut
from autofunc.captured.cut_points import ABSENT, FIRST, default_layers, find_cut_points
from autofunc.captured.evaluation import Evaluation, evaluation_of
from autofunc.captured.experts import expert_parameters
from autofunc.captured.filled import filled, full_values
from autofunc.captured.flow import Flow
from autofunc.captured.holders import holders, idle, idle_note, with_idle
from autofunc.captured.module_source import ModuleSource
from autofunc.captured.over_ranks import over_ranks, planned
from autofunc.captured.segment import Segment
from autofunc.captured.source import device_of
from autofunc.errors import ModelError
from autofunc.model import CutPoints, Layer, Model, Specialised, State
from autofunc.model.specialised import LayerFunction
from autofunc.model.state import StatefulFunction
from autofunc.random import make_key
from autofunc.spreading import AxisPlan


@dataclass(frozen=True)
class Shared:
    """The values that a stage's layers share for one microbatch."""

    values: Mapping[str, Any]  # by name; they depend on the batch and constants alone
    device: torch.device
    key: Tensor | None  # of the microbatch's randomness; None evaluates


class CapturedModel(Model):
    """A `Model` whose layers are pieces of a captured forward; made by `af.from_module` and `af.from_function`.

    The graph is captured for every signature of a microbatch. Values that depend on the batch and constants alone are
    computed once per stage and microbatch (`Specialised.share`), instead of being sent.
    """

    def __init__(
        self,
        captures: Captures,
        example: Mapping[str, Any],
        names: Sequence[str] | None = None,
        *,
        config: Any = None,
        trainable: Sequence[str] = ("*",),
        notes: Sequence[str] = (),
    ) -> None:
        self._captures, self._example, self._source = captures, example, captures.source
        self.frozen = (captures.reads, captures.kept)
        flow = captures.flow(example, None)[1]
        self.notes = tuple(dict.fromkeys((*notes, *flow.exported.notes)))
        self._found = self._cut_points(flow)
        if names is None:
            names = default_layers(self._source.module, self._found, flow.exported.markers)
        first = self._first_name(flow)
        self._found = CutPoints({first: flow.first_weighted, **self._found.start}, self._found.refused)
        # a layer that begins with the first operator gives the first layer its name
        layers = [first, *(name for name in names if self._found.start[name] > self._found.start[first])]
        self._names, self._known_states = layers, flow.exported.state_names
        probe = self._cut_of(flow, [{} for _ in layers])
        unread = idle(self._source.parameters, probe.params, trainable)
        if unread:
            self.notes = tuple(dict.fromkeys((*self.notes, idle_note(unread, self._source.select(example)))))
        self._holders = holders(layers, with_idle(probe.params, unread, self._source.parameters), self._source.aliases)
        self._states = {layer: tuple(names) for layer, names in zip(layers, probe.states, strict=True) if names}
        ties = {path: name for owned in self._holders.values() for name, path in owned.items() if path != name}
        self._layer_of_path = {path: layer for layer, owned in self._holders.items() for path in owned.values()}
        self._layer_of_path |= {name: layer for layer, names in self._states.items() for name in names}
        super().__init__(
            {name: Layer(apply=self._apply(number)) for number, name in enumerate(layers)},
            ties=ties, config=config, trainable=trainable,
        )  # fmt: skip

    uncut_with_adapters = "adapters of a captured module are not cut yet"

    @property
    def example(self) -> Mapping[str, Any]:
        """The batch it was first captured with."""
        return self._example

    @property
    def used(self) -> list[str]:
        """Canonical paths of the parameters that some layer uses, and of trainable ones that none uses."""
        return list(dict.fromkeys(name for owned in self._holders.values() for name in owned))

    @property
    def key_name(self) -> str:  # type: ignore[override]
        """See `Model.key_name`: another name if forward takes an entry called `key`."""
        return self._source.key_name

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """See `Model.device`."""
        return device_of(self._source.module)

    @property
    def module(self) -> nn.Module:
        """The captured module."""
        return self._source.module

    @property
    def is_module(self) -> bool:
        """True for a model of a module, False for one of a function."""
        return isinstance(self._source, ModuleSource)

    def cut_before(self, names: Sequence[str]) -> CapturedModel:
        """See `Model.cut_before`: layers also begin at these places."""
        start = self._found.start
        known = {start[name]: name for name in self._names if name in start}
        wanted = {**{start[name]: name for name in names}, **known}
        if wanted.keys() == known.keys():
            return self
        ordered = [wanted[position] for position in sorted(wanted)]
        return CapturedModel(
            self._captures, self._example, ordered,
            config=self.config, trainable=self.trainable, notes=self.notes,
        )  # fmt: skip

    def selected(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch's entries that forward takes."""
        return self._source.select(batch)

    # --- what `Model` derives from its layers

    def _check_names(self, layers: Iterable[str]) -> None:
        """Allow layers inside one another: parameters are found by the layers that use them, not by their names."""

    @cached_property
    def spec(self) -> dict[str, Tensor]:
        """See `Model.spec`."""
        params = self._source.parameters
        made = {
            path: torch.empty_like(params[name], device="meta")
            for owned in self._holders.values()
            for name, path in owned.items()
        }
        self._check_trainable(made)
        return {path: made[path] for path in sorted(made, key=tree.split_path)}

    @cached_property
    def expert_paths(self) -> frozenset[str]:
        """See `Model.expert_paths`: the parameters that the captured forward multiplies experts' rows by."""
        flow = self._captures.flow(self._example, None)[1]
        return expert_parameters(flow.exported.graph, flow.exported.params, self._source.what)

    def layer_of(self, path: str) -> str | None:
        """See `Model.layer_of`."""
        return self._layer_of_path.get(path)

    def inner_path(self, path: str) -> str:
        """See `Model.inner_path`."""
        prefix = (self.layer_of(path) or "") + "."
        # a path outside the layer must not be mistaken for one inside it
        return path.removeprefix(prefix) if path.startswith(prefix) else "@" + path.replace(".", "/")

    @property
    def title(self) -> str:
        """See `Model.title`."""
        return self._source.what

    def has_own_value(self, path: str) -> bool:
        """See `Model.has_own_value`."""
        return self._source.has_value(path)

    def init_paths(
        self, paths: Iterable[str], seed: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """See `Model.init_paths`. Real weights are copied; meta ones are made from (seed, path)."""
        wanted = sorted({self.canonical(path) for path in paths}, key=tree.split_path)
        return self._source.weights(wanted, seed, torch.device(device), dtype)

    def init_state_paths(self, paths: Iterable[str] | None, device: torch.device | str) -> dict[str, Tensor]:
        """See `Model.init_state_paths`: copies of the module's buffers, or of stored ones."""
        wanted = sorted(self._known_states if paths is None else set(paths), key=tree.split_path)
        if torch.device(device).type == "meta":
            return {path: torch.empty_like(self._source.module.get_buffer(path), device="meta") for path in wanted}
        return {path: self._source.buffer(path).detach().to(device, copy=True) for path in wanted}

    def state_dict(self, params: tree.Nested, state: tree.Nested | None = None) -> dict[str, Tensor]:
        """See `Model.state_dict`: for a module its own, so that `module.load_state_dict` takes it."""
        if not self.is_module:
            return super().state_dict(params, state)
        return self.to_module(params, state).state_dict()

    def to_module(self, params: tree.Nested, state: tree.Nested | None = None) -> nn.Module:
        """See `Model.to_module`: a copy of the captured module, which itself stays unchanged."""
        if not isinstance(self._source, ModuleSource):
            return super().to_module(params, state)
        given = full_values(self._source, self.with_state(params, state))
        made: nn.Module = filled(self._source, {path: leaf.detach().clone() for path, leaf in given.items()})
        return made

    # --- captures

    def with_needed_key(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `Model.with_needed_key`."""
        needed = batch.get(self.key_name) is None and self.without_key(batch).drawn
        return {**batch, self.key_name: make_key(0)} if needed else dict(batch)

    def without_key(self, batch: Mapping[str, Any]) -> Evaluation:
        """Return how the module is evaluated on a batch without a key."""
        return evaluation_of(self._captures.flow(batch, None, self._known_states, evaluates=True)[1])

    def specialise(
        self,
        microbatch: Mapping[str, Any] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        *,
        training: bool = True,
        over: AxisPlan | None = None,
    ) -> Specialised:
        """See `Model.specialise`: capture the forward for such microbatches, and cut it at the layers.

        Raises:
            ModelError: for a forward that cannot be captured, a microbatch that would need other layers, or parameters
                with neither the module's dtypes nor a single one.
        """
        batch = self._example if microbatch is None else microbatch
        known, evaluates = self._known_states, microbatch is not None and microbatch.get(self.key_name) is None
        signature, flow = self._captures.flow(
            batch, self._recast(dtypes or {}), known, training=training or not known, evaluates=evaluates
        )
        entries = tuple(self._source.select(batch))
        key = ("specialised", Identity(self), signature, entries, over)
        return cache.shared.get(key, lambda: self._specialised_for(self._over(flow, over), entries))

    def over_ranks(self, axis: str, size: int, table: Any, *, sequence: bool) -> AxisPlan:
        """See `Model.over_ranks`: planned on the example's graph."""
        flow = self._captures.flow(self._example, None, self._known_states)[1]
        return planned(flow, self._source.module, axis, size, table, sequence=sequence, what=self._source.what)

    def _over(self, flow: Flow, over: AxisPlan | None) -> Flow:
        return flow if over is None else over_ranks(flow, over, self._source.what)

    def _specialised_for(self, flow: Flow, entries: Sequence[str]) -> Specialised:
        cut = self._cut_of(flow, [self._inner(layer) for layer in self._names])
        for layer, used in zip(self._names, cut.params, strict=True):
            missing = set(used) - self._holders[layer].keys()
            if missing:
                raise ModelError(
                    f"{self._source.what}: for this batch, layer {layer!r} uses {sorted(missing)[0]!r}, which it did "
                    "not use for the example; give an example with all entries"
                )
        others = {name for names in cut.states for name in names} - self._known_states
        if others:
            raise ModelError(
                f"{self._source.what}: for this batch forward writes to its buffer {min(others)!r}, unlike for the "
                "example; give an example for which it does"
            )
        number_of, key_name = {name: number for number, name in enumerate(self._names)}, self.key_name

        def share(layers: Sequence[str], microbatch: Mapping[str, Any]) -> Shared:
            segment, keys = cut.shared([number_of[name] for name in layers])
            given = {name: microbatch[name] for name in entries}
            leaves = [leaf for leaf in tree.leaves_and_spec(given)[0] if isinstance(leaf, Tensor)]
            device, key = leaves[0].device if leaves else torch.device("cpu"), microbatch.get(key_name)
            values, _ = segment({}, leaves, {}, device, key)
            return Shared(dict(zip(keys, values if len(keys) != 1 else [values], strict=True)), device, key)

        def programs(layers: Sequence[str]) -> list[Any]:
            numbers = [number_of[name] for name in layers]
            return [cut.shared(numbers), *(cut.segments[number] for number in numbers)]

        segments = dict(zip(self._names, cut.segments, strict=True))
        stateful = {name: _stateful_function(segment) for name, segment in segments.items() if name in self._states}
        functions = {name: _function(segment) for name, segment in segments.items() if name not in self._states}
        return Specialised(functions, share, programs, self._found, stateful)

    def _recast(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype | None:
        """Return the dtype to capture a forward with, or None for the module's own dtypes."""
        own = {path: leaf.dtype for path, leaf in self.spec.items() if leaf.is_floating_point()}
        given = {path: dtype for path, dtype in dtypes.items() if path in own}
        if all(dtype == own[path] for path, dtype in given.items()):
            return None
        if len(set(given.values())) > 1:
            names = ", ".join(sorted(map(str, set(given.values()))))
            raise ModelError(f"{self._source.what}: its parameters are {names}; give all the same dtype, or their own")
        return next(iter(given.values()))

    def _apply(self, number: int) -> Callable[..., Any]:
        """Return the function of a layer that is run alone."""

        def apply(params: Mapping[str, Any], x: Any, batch: Mapping[str, Any], *state: Any) -> Any:
            name, specialised = self._names[number], self.specialise(batch, training=all(state[1:]))
            given: dict[str, State] = {name: tree.flatten(state[0])} if state else {}
            x, states = specialised.layer(name, params, x, specialised.share([name], batch), given)
            return (x, tree.nest(states[name])) if state else x

        return apply

    def _inner(self, layer: str) -> dict[str, str]:
        paths = {**self._holders[layer], **{name: name for name in self._states.get(layer, ())}}
        return {name: self.inner_path(path) for name, path in paths.items()}

    def _cut_of(self, flow: Flow, inner_paths: Sequence[Mapping[str, str]]) -> Cut:
        places, starts = self._cut_points(flow), list[int]()
        for name in reversed(self._names[1:]):
            refused = places.refused.get(name, "")
            if refused and refused not in ABSENT:
                raise ModelError(f"{self._source.what}: for this batch no layer can begin at {name!r}, which {refused}")
            # a part that does not run for this batch leaves an empty layer
            starts.append(places.start.get(name, starts[-1] if starts else len(flow.nodes)))
        return Cut(flow, starts[::-1], inner_paths)

    def _cut_points(self, flow: Flow) -> CutPoints:
        return find_cut_points(flow, self._source.module_names)

    def _first_name(self, flow: Flow) -> str:
        start, first = self._found.start, flow.first_weighted
        at_first = [name for name, position in start.items() if position == first]
        listed = default_layers(self._source.module, self._found, flow.exported.markers)
        free = FIRST
        while free in start:
            free += "_"
        return next((name for name in listed if name in at_first), at_first[-1] if at_first else free)


def _function(segment: Segment) -> LayerFunction:
    """Return a segment as a layer's function."""

    def function(params: Mapping[str, Any], x: Any, shared: Shared) -> Any:
        return segment(params, _received(segment, x), shared.values, shared.device, shared.key)[0]

    return function


def _stateful_function(segment: Segment) -> StatefulFunction:
    """Return a segment as the function of a layer with state."""

    def function(params: Mapping[str, Any], x: Any, shared: Shared, state: State) -> tuple[Any, State]:
        return segment(params, _received(segment, x), shared.values, shared.device, shared.key, state)

    return function


def _received(segment: Segment, x: Any) -> Sequence[Tensor]:
    return [] if not segment.num_received else [x] if segment.num_received == 1 else x
