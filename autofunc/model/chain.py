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
        config: anything that describes the model; stored unchanged.
        trainable: shell-style patterns of the canonical paths that get gradients; `*` crosses dots.
        tensor_parallel: how to shard its parameters over a tp axis; None means it cannot be sharded.
        experts: patterns of the canonical paths of routed experts' parameters, see `expert_paths`.
        in_transformers: `in_transformers(params) -> (values of its config.json, state dict)`, for `autofunc export`.

    Raises:
        ModelError: for colliding names. Ties and patterns that match no parameter raise when `spec` is first read.
    """

    key_name = KEY
    """The entry of a batch or microbatch that holds its random key."""

    device = torch.device("cpu")
    """The default device of `init`: a captured module's own, else the CPU."""

    frozen: Sequence[Any] = ()  # what `specialise` reads besides its arguments, for fingerprints
    with_cache: WithCache | None = None  # builds the model with a KV cache, if it can have one

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
        self.stored: Stored | None = None  # initial values that replace the layers' own
        for alias, canonical in self.ties.items():
            if canonical in self.ties:
                raise ModelError(f"tie {alias!r}: {canonical!r} is itself tied; name {self.ties[canonical]!r} instead")

    def _check_names(self, layers: Iterable[str]) -> None:
        tree.check_prefix_free(layers)

    def __repr__(self) -> str:
        return f"Model({', '.join(self.layers)})"

    @cached_property
    def spec(self) -> dict[str, torch.Tensor]:
        """Every parameter as layers see it, including aliases: path -> meta tensor, sorted by path. Allocates nothing."""
        flat = self._init_layers(self.layers, 0, torch.device("meta"), torch.float32)
        for alias, canonical in self.ties.items():
            if canonical not in flat:
                raise ModelError(f"tie {alias!r} -> {canonical!r}: no such parameter; {one_of(canonical, flat)}")
            if self.layer_of(alias) is None:
                raise ModelError(f"tie {alias!r}: no layer's name begins this path; {one_of(alias, self.layers)}")
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
        """All state between microbatches: path -> meta tensor, sorted; a path that is a parameter too is a ModelError."""
        spec = self.init_state_paths(None, "meta")
        both = [path for path in spec if path in self.spec]
        if both:
            raise ModelError(f"{both[0]!r} is both a parameter and state; rename one of them")
        return spec

    def _check_trainable(self, leaves: Mapping[str, torch.Tensor]) -> None:
        known = list(leaves)
        lost = [path for path in known if leaves[path].is_complex() and tree.matches(self.canonical(path), self.trainable)]
        if lost:
            raise ModelError(
                f"parameter {lost[0]!r} is {leaves[lost[0]].dtype}, and only real parameters get gradients; store its "
                "real and imaginary parts (torch.view_as_real), or leave it out of trainable"
            )
        matching("trainable", self.trainable if known else (), known)

    def check_stored(self) -> None:
        """Refuse stored values that do not fit this model.

        Raises:
            ModelError: naming a value that is missing, or has the wrong shape or an incompatible dtype.
        """
        if self.stored is not None:
            check_fit(self.stored, {self.canonical(path): leaf for path, leaf in self.spec.items()})

    def canonical(self, path: str) -> str:
        """Return the path under which trees hold this parameter."""
        return self.ties.get(path, path)

    def is_trainable(self, path: str) -> bool:
        """Return whether a parameter, by any of its names, gets a gradient: floating point and matched by `trainable`."""
        return self.spec[path].is_floating_point() and tree.matches(self.canonical(path), self.trainable)

    def layer_of(self, path: str) -> str | None:
        """Return the name of the layer that a parameter's path belongs to, or None."""
        return next((name for name in self.layers if path.startswith(name + ".")), None)

    def inner_path(self, path: str) -> str:
        """Return a parameter's path inside its layer's nested dicts."""
        return path[len(self.layer_of(path) or "") + 1 :]

    notes: tuple[str, ...] = ()
    """What the conversion to this model dropped or changed, in words for its user."""

    @property
    def expert_paths(self) -> frozenset[str]:
        """Canonical paths of parameters whose dim 0 runs over routed experts, each entry read by its expert alone."""
        return matching("experts", self.experts, [path for path in self.spec if path not in self.ties])

    def specialise(
        self,
        microbatch: Mapping[str, Any] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        *,
        training: bool = True,
        over: Any = None,
    ) -> Specialised:
        """Return the model as plain functions, for microbatches of one signature and parameters of known dtypes.

        Args:
            microbatch: with real tensors, as layers see it; only their shapes, dtypes and devices matter. None takes the
                example that the model was captured with, if any.
            dtypes: that parameters are computed in, by canonical path; None takes the model's own.
            training: True updates state, False evaluates with the given state.
            over: returned by `over_ranks`; None if one process computes the model, or values carry their own placements.

        Raises:
            ModelError: if it cannot run on such a microbatch, or with such dtypes.
        """
        return self._specialised[training]

    @cached_property
    def _specialised(self) -> dict[bool, Specialised]:
        """By training mode: layers of pure functions do not depend on the batch."""
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
        """Return this model with layers that begin at these places.

        Args:
            names: of cut points, from `specialise`.
        """
        return self

    def has_own_value(self, path: str) -> bool:
        """Return whether a parameter, by its canonical path, has its own initial value, independent of the seed."""
        return self.stored is not None

    @property
    def uses_seed(self) -> bool:
        """True if `init` draws any parameter from the seed."""
        return not self.spec or not all(self.has_own_value(self.canonical(path)) for path in self.spec)

    def seed_of(self, seed: int | None, device: torch.device | str) -> int:
        """Return the seed that `init` uses, 0 by default; warn if a given seed has no effect."""
        if seed is not None and torch.device(device).type != "meta" and not self.uses_seed:
            warnings.warn(
                f"{self.title} has its own weights, and init returns copies of them: seed={seed} has no effect. Leave it "
                "out; to draw weights from a seed, capture the module on the meta device",
                stacklevel=3,
            )
        return 0 if seed is None else seed

    def init(self, seed: int | None = None, device: Device = None, dtype: torch.dtype | None = None) -> TensorDict:
        """Return all parameters, by canonical path. Each depends on (seed, path) alone, whatever the layout or device.

        Parameters with their own values, from a captured module or function or from files, keep those.

        Args:
            seed: by default 0. A `UserWarning` is raised if all parameters have their own values, so it has no effect.
            device: of the parameters; by default `Model.device`.
            dtype: of floating-point parameters; by default fp32, or the dtype of a captured module's own weights.
        """
        device = self.device if device is None else device
        return tree.to_tensordict(self.init_paths(self.spec, self.seed_of(seed, device), device, dtype))

    def init_paths(
        self, paths: Iterable[str], seed: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the parameters with these paths (or their canonical ones), running only their layers' inits."""
        wanted = {self.canonical(path) for path in paths}
        if self.stored is not None and torch.device(device).type != "meta":
            read = self.stored.read(sorted(wanted, key=tree.split_path))
            return {path: leaf.to(device, dtype or torch.float32, copy=True) for path, leaf in read.items()}
        needed = {self.layer_of(path) for path in wanted}
        layers = {name: layer for name, layer in self.layers.items() if name in needed}
        flat = self._init_layers(layers, seed, torch.device(device), dtype or torch.float32)
        return {path: leaf for path, leaf in flat.items() if path in wanted}

    def init_state(self, device: Device = None) -> TensorDict:
        """Return the layers' initial state, by path: a captured module's buffers, or the results of `init_state`.

        Args:
            device: of the state; by default as for `init`.
        """
        return tree.to_tensordict(self.init_state_paths(None, self.device if device is None else device))

    def init_state_paths(self, paths: Iterable[str] | None, device: torch.device | str) -> dict[str, torch.Tensor]:
        """Return the initial state with these paths, or all of it, sorted by path."""
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
            ModelError: if any is missing, or has the wrong shape or dtype.
        """
        check_state(self.state_spec, flat)
        return self.state_by_layer({path: flat[path] for path in self.state_spec})

    def state_by_layer(self, flat: Mapping[str, torch.Tensor]) -> Mapping[str, State]:
        """Group state by layer, under its paths inside the layer."""
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for path, leaf in flat.items():
            groups.setdefault(self.layer_of(path) or "", {})[self.inner_path(path)] = leaf
        return groups

    def flat_state(self, states: Mapping[str, State], paths: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Return state as a flat tree, the inverse of `state_by_layer`; by default all of it."""
        paths = self.state_spec if paths is None else paths
        return {path: states[self.layer_of(path) or ""][self.inner_path(path)] for path in paths}

    def __call__(self, params: tree.Nested, batch: Mapping[str, Any], state: tree.Nested | None = None) -> Any:
        """Evaluate all layers on one process.

        Args:
            params: a tree with every canonical path.
            batch: a mapping; a key in its entry `key_name` enables dropout.
            state: of a model that has state.

        Returns:
            The last layer's output, any pytree.
        """
        flat = tree.flatten(params)
        by_layer = self.layer_trees({path: self.lookup(flat, path) for path in self.spec})
        batch = {**batch, self.key_name: as_key(batch.get(self.key_name))}
        specialised = self.specialise(batch, {path: leaf.dtype for path, leaf in flat.items()}, training=False)
        states = self.state_trees({} if state is None else tree.flatten(state))
        return specialised.run(list(self.layers), by_layer, None, batch, states)[0]

    def with_needed_key(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch this model can run on: with some key if it has none and the forward requires one.

        For computing shapes and costs, where values do not matter.
        """
        return dict(batch)

    def lookup(self, flat: Mapping[str, torch.Tensor], path: str) -> torch.Tensor:
        """Return a parameter by any of its names, from a flat tree by canonical path.

        Raises:
            ModelError: if it is missing.
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
