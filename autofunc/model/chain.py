"""A model: named pure layers in order, with ties between parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict

from autofunc import tree
from autofunc.errors import ModelError, one_of
from autofunc.model.cache_form import WithCache
from autofunc.model.cut_points import CutPoints
from autofunc.model.given_back import GivenBack, InTransformers
from autofunc.model.layer import Layer, drawing_as
from autofunc.model.over_processes import OverProcesses
from autofunc.model.patterns import matching
from autofunc.model.placement_rules import TensorParallel
from autofunc.model.specialised import LayerFunction, Specialised
from autofunc.model.state import State, check_state, stateful
from autofunc.model.stored import Stored, check_fit
from autofunc.random import KEY, InitKey, as_key

Device = torch.device | str | None


class Model(OverProcesses, GivenBack):
    """Named pure layers in order.

    A parameter's path is its layer's name joined with its name inside the layer: `h.0.attn.weight`. A tie lets one layer
    use another's parameter: `ties={"head.weight": "wte.weight"}` fills `wte.weight` in as `head.weight`. Trees of
    parameters, gradients and checkpoints hold the canonical name only (`wte.weight`).

    Args:
        layers: name -> `Layer`, in the order in which they run. Names are split at dots.
        ties: alias path -> canonical path.
        config: anything that describes the model; kept as it is.
        trainable: shell-style patterns of the canonical paths that get gradients; `*` crosses dots.
        tensor_parallel: how its parameters are cut over a tp axis; without one they cannot be.
        experts: patterns of the canonical paths of parameters of routed experts, see `expert_paths`.
        in_transformers: `in_transformers(params) -> (values of its config.json, state dict)`, for `autofunc export`.

    Raises:
        ModelError: for names that collide. Ties and patterns that name no parameter are found when `spec` is first read.
    """

    key_name = KEY
    """The entry of a batch and of a microbatch that is its randomness."""

    device = torch.device("cpu")
    """Where `init` makes parameters and state unless told otherwise: where a captured module is, else the CPU."""

    frozen: Sequence[Any] = ()  # what `specialise` reads beside its arguments, for fingerprints
    with_cache: WithCache | None = None  # the model with a cache of keys and values, where it can have one

    def __init__(
        self,
        layers: Mapping[str, Layer],
        *,
        ties: Mapping[str, str] | None = None,
        config: Any = None,
        trainable: Sequence[str] = ("*",),
        tensor_parallel: TensorParallel | None = None,
        experts: Sequence[str] = (),
        in_transformers: InTransformers | None = None,
    ) -> None:
        if not layers:
            raise ModelError("a model needs at least one layer")
        self._check_names(layers)
        self.layers = dict(layers)
        self.ties, self.config, self.trainable = dict(ties or {}), config, tuple(trainable)
        self.tensor_parallel, self.experts = tensor_parallel, tuple(experts)
        self.in_transformers = in_transformers
        self.stored: Stored | None = None  # initial values, instead of what layers make
        for alias, canonical in self.ties.items():
            if canonical in self.ties:
                raise ModelError(f"tie {alias!r}: {canonical!r} is itself tied; name {self.ties[canonical]!r} instead")

    def _check_names(self, layers: Iterable[str]) -> None:
        tree.check_prefix_free(layers)

    def __repr__(self) -> str:
        return f"Model({', '.join(self.layers)})"

    @cached_property
    def spec(self) -> dict[str, torch.Tensor]:
        """Every parameter as a layer sees it, aliases included: path -> meta tensor, sorted by path. Allocates nothing."""
        flat = self._init_layers(self.layers, 0, torch.device("meta"), torch.float32)
        for alias, canonical in self.ties.items():
            if canonical not in flat:
                raise ModelError(f"tie {alias!r} -> {canonical!r}: no such parameter; {one_of(canonical, flat)}")
            if self.layer_of(alias) is None:
                raise ModelError(f"tie {alias!r}: the path begins with no layer's name; {one_of(alias, self.layers)}")
            own = flat.get(alias)
            if own is not None and own.shape != flat[canonical].shape:
                raise ModelError(
                    f"tie {alias!r} -> {canonical!r}: shapes {tuple(own.shape)} and {tuple(flat[canonical].shape)} differ"
                )
            flat[alias] = flat[canonical]
        self._check_trainable(flat)
        return {path: flat[path] for path in sorted(flat, key=tree.split_path)}

    @cached_property
    def state_spec(self) -> dict[str, torch.Tensor]:
        """All state that layers keep from one microbatch to the next: path -> meta tensor, sorted by path."""
        spec = self.init_state_paths(None, "meta")
        both = [path for path in spec if path in self.spec]
        if both:
            raise ModelError(f"{both[0]!r} is a parameter and state; give one of them another name")
        return spec

    def _check_trainable(self, leaves: Mapping[str, torch.Tensor]) -> None:
        known = list(leaves)
        lost = [path for path in known if leaves[path].is_complex() and tree.matches(self.canonical(path), self.trainable)]
        if lost:
            raise ModelError(
                f"parameter {lost[0]!r} is {leaves[lost[0]].dtype}, and gradients are of real parameters only; keep its "
                "real and imaginary parts (torch.view_as_real), or leave it out of trainable"
            )
        matching("trainable", self.trainable if known else (), known)

    def check_stored(self) -> None:
        """Refuse stored values that are not those of this model.

        Raises:
            ModelError: naming what is missing, or has another shape or kind of dtype.
        """
        if self.stored is not None:
            check_fit(self.stored, {self.canonical(path): leaf for path, leaf in self.spec.items()})

    def canonical(self, path: str) -> str:
        """The path under which trees hold this parameter."""
        return self.ties.get(path, path)

    def is_trainable(self, path: str) -> bool:
        """Whether the parameter (by any of its names) gets a gradient: floating point and named in `trainable`."""
        return self.spec[path].is_floating_point() and tree.matches(self.canonical(path), self.trainable)

    def layer_of(self, path: str) -> str | None:
        """The name of the layer a parameter path belongs to."""
        return next((name for name in self.layers if path.startswith(name + ".")), None)

    def inner_path(self, path: str) -> str:
        """Where the layer that a parameter path belongs to finds it in its own nested dicts."""
        return path[len(self.layer_of(path) or "") + 1 :]

    notes: tuple[str, ...] = ()
    """What was left out or changed when it was made of something else, in words for its user."""

    @property
    def expert_paths(self) -> frozenset[str]:
        """Canonical paths of the parameters with an entry for each routed expert in dim 0, which only these read."""
        return matching("experts", self.experts, [path for path in self.spec if path not in self.ties])

    def specialise(
        self,
        microbatch: Mapping[str, Any] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        *,
        training: bool = True,
        over: Any = None,
    ) -> Specialised:
        """The model as plain functions, for microbatches of one signature and parameters of known dtypes.

        Args:
            microbatch: one with real tensors, as layers see it; of these only shapes, dtypes and devices matter. None: the
                one that the model was made with, where there is one.
            dtypes: of parameters as they are computed with, by canonical path; None: the model's own.
            training: whether new state is wanted, or the model only evaluated with the state it has.
            over: what `over_ranks` gave; None: one process computes it, or values know how they lie.

        Raises:
            ModelError: when it cannot run on such a microbatch, or with such dtypes.
        """
        return self._specialised[training]

    @cached_property
    def _specialised(self) -> dict[bool, Specialised]:
        """By training: layers of pure functions are the same for every batch."""
        return {training: self._in_mode(training) for training in (True, False)}

    def _in_mode(self, training: bool) -> Specialised:
        plain: dict[str, LayerFunction] = {
            name: drawing_as(name, layer.apply) for name, layer in self.layers.items() if layer.init_state is None
        }
        kept = {name: layer for name, layer in self.layers.items() if name not in plain}
        others = {name: stateful(name, layer, training=training) for name, layer in kept.items()}
        cut_points = CutPoints({name: position for position, name in enumerate(self.layers)})
        return Specialised(
            plain, lambda layers, microbatch: microbatch,
            lambda layers: [None, *(plain.get(name) or others[name] for name in layers)], cut_points, others,
        )  # fmt: skip

    def cut_before(self, names: Sequence[str]) -> Model:
        """This model with layers that begin at these places.

        Args:
            names: of the cut points that `specialise` gives.
        """
        return self

    def has_own_value(self, path: str) -> bool:
        """Whether a parameter, by its canonical path, has an initial value of its own, which no seed changes."""
        return self.stored is not None

    @property
    def uses_seed(self) -> bool:
        """Whether `init` makes any parameter from the seed."""
        return not self.spec or not all(self.has_own_value(self.canonical(path)) for path in self.spec)

    def seed_of(self, seed: int | None, device: torch.device | str) -> int:
        """What `init` makes values from; warns where a seed is given and no value is made from it."""
        if seed is not None and torch.device(device).type != "meta" and not self.uses_seed:
            warnings.warn(
                f"{self.title} has weights of its own, and init returns copies of them: seed={seed} changes none. Leave it "
                "out; weights are made from a seed where a module is on the meta device",
                stacklevel=3,
            )
        return 0 if seed is None else seed

    def init(self, seed: int | None = None, device: Device = None, dtype: torch.dtype | None = None) -> TensorDict:
        """Make all parameters, by canonical path. Each depends on (seed, path) alone, whatever the layout, device or order.

        Parameters that have values of their own, because a captured module or function has real ones or because they are
        stored in files, keep those.

        Args:
            seed: by default 0. A `UserWarning` says so when all parameters have values of their own, and it is not used.
            device: where they are made; by default `Model.device`.
            dtype: of floating-point ones; by default fp32, or what a captured module's own weights have.
        """
        device = self.device if device is None else device
        return tree.to_tensordict(self.init_paths(self.spec, self.seed_of(seed, device), device, dtype))

    def init_paths(
        self, paths: Iterable[str], seed: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Make the parameters with these paths (aliases give their canonical one), running only their layers' inits."""
        wanted = {self.canonical(path) for path in paths}
        if self.stored is not None and torch.device(device).type != "meta":
            read = self.stored.read(sorted(wanted, key=tree.split_path))
            return {path: leaf.to(device, dtype or torch.float32, copy=True) for path, leaf in read.items()}
        needed = {self.layer_of(path) for path in wanted}
        layers = {name: layer for name, layer in self.layers.items() if name in needed}
        flat = self._init_layers(layers, seed, torch.device(device), dtype or torch.float32)
        return {path: leaf for path, leaf in flat.items() if path in wanted}

    def init_state(self, device: Device = None) -> TensorDict:
        """The state that layers begin with, by path: a captured module's buffers, or what `init_state` of layers makes.

        Args:
            device: where it is made; by default as for `init`.
        """
        return tree.to_tensordict(self.init_state_paths(None, self.device if device is None else device))

    def init_state_paths(self, paths: Iterable[str] | None, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The state with these paths, or all of it, sorted by path."""
        layers = {name: layer for name, layer in self.layers.items() if layer.init_state is not None}
        flat: dict[str, torch.Tensor] = {}
        with torch.device(device), torch.no_grad():
            for name, layer in layers.items():
                assert layer.init_state is not None
                made = layer.init_state(InitKey(0, name, torch.device(device)))
                flat.update({tree.join(name, path): leaf for path, leaf in tree.flatten(made).items()})
            if self.stored is not None and torch.device(device).type != "meta":
                read = self.stored.read([path for path in flat if path in self.stored.shapes])
                flat |= {path: leaf.to(device, flat[path].dtype, copy=True) for path, leaf in read.items()}
        return {path: flat[path] for path in sorted(flat if paths is None else set(paths), key=tree.split_path)}

    def state_trees(self, flat: Mapping[str, torch.Tensor]) -> Mapping[str, State]:
        """Group a flat tree of all state by layer.

        Raises:
            ModelError: when some is missing, or has another shape or dtype.
        """
        check_state(self.state_spec, flat)
        return self.state_by_layer({path: flat[path] for path in self.state_spec})

    def state_by_layer(self, flat: Mapping[str, torch.Tensor]) -> Mapping[str, State]:
        """Group state by layer, under the paths that it has there."""
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for path, leaf in flat.items():
            groups.setdefault(self.layer_of(path) or "", {})[self.inner_path(path)] = leaf
        return groups

    def flat_state(self, states: Mapping[str, State], paths: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The opposite of `state_by_layer`; by default of all state."""
        paths = self.state_spec if paths is None else paths
        return {path: states[self.layer_of(path) or ""][self.inner_path(path)] for path in paths}

    def __call__(self, params: tree.Nested, batch: Mapping[str, Any], state: tree.Nested | None = None) -> Any:
        """Run all layers on one process, to evaluate them.

        Args:
            params: a tree with every canonical path.
            batch: a mapping; its entry `key_name`, a key, turns dropout on.
            state: of a model that has some.
        """
        flat = tree.flatten(params)
        by_layer = self.layer_trees({path: self.lookup(flat, path) for path in self.spec})
        batch = {**batch, self.key_name: as_key(batch.get(self.key_name))}
        specialised = self.specialise(batch, {path: leaf.dtype for path, leaf in flat.items()}, training=False)
        states = self.state_trees({} if state is None else tree.flatten(state))
        return specialised.run(list(self.layers), by_layer, None, batch, states)[0]

    def with_needed_key(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch that this model can run on: with some key, if it has none and the forward cannot do without.

        For working out shapes and costs, whatever the values.
        """
        return dict(batch)

    def lookup(self, flat: Mapping[str, torch.Tensor], path: str) -> torch.Tensor:
        """A parameter by any of its names, from a flat tree of canonical ones.

        Raises:
            ModelError: when it is missing.
        """
        canonical = self.canonical(path)
        if canonical not in flat:
            raise ModelError(
                f"params have no {canonical!r}, which layer {self.layer_of(path)!r} needs; {one_of(path, flat)}"
            )
        return flat[canonical]

    def layer_trees(self, flat: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Group {path: tensor} into each layer's own nested dicts."""
        groups: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.layers}
        for path, leaf in flat.items():
            name = self.layer_of(path)
            assert name is not None
            groups[name][self.inner_path(path)] = leaf
        return {name: tree.nest(group) for name, group in groups.items()}

    def _init_layers(
        self, layers: Mapping[str, Layer], seed: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        flat: dict[str, torch.Tensor] = {}
        with torch.device(device), torch.no_grad():
            for name, layer in layers.items():
                made = layer.init(InitKey(seed, name, device, dtype))
                flat.update({tree.join(name, path): leaf for path, leaf in tree.flatten(made).items()})
        return {path: leaf for path, leaf in flat.items() if device.type == "meta" or path not in self.ties}
