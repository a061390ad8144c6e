"""A process's part of a pipeline's trees: make, place and gather them, and clip gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.mesh import pp_ranks
from autofunc.model import Model, given_state
from autofunc.runtime.collect import collect_tree
from autofunc.runtime.gather import gather_tree
from autofunc.schedule import Schedule
from autofunc.shard import Sharding
from autofunc.shard.norm import clip_by_norm, global_norm
from autofunc.shard.parameters import Parameters
from autofunc.splitting import Stage


class Held:
    """Knows which parameters and state this process holds; stores none itself.

    Args:
        stages: all of them.
        schedule: which rank has which stage.
        mesh: see `af.pipeline`.
        sharding: see `af.pipeline`.
        parameters: of another pipeline on the same stages, to share; None creates them.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        mesh: DeviceMesh | None,
        sharding: Sharding,
        parameters: Parameters | None,
    ) -> None:
        self.stages = tuple(stages)
        self.schedule = schedule
        self.mesh = mesh
        self.sharding = sharding
        self._ranks = pp_ranks(mesh) if mesh is not None else None
        self.local_ranks = tuple(range(schedule.num_ranks)) if mesh is None else (mesh.get_local_rank("pp"),)
        self._local_stages = [stage for stage in stages if schedule.placement[stage.index] in self.local_ranks]
        self._parameters = parameters or Parameters(self._local_stages, stages[0].model, mesh, sharding)

    def init(
        self, seed: int | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TensorDict:  # fmt: skip
        """Return the initial parameters of this process's ranks: the same values in every layout.

        A captured module's own weights and stored weights are copied; others are made from the seed. `explain` tells which.

        Args:
            seed: of the weights; 0 by default. A `UserWarning` reports a seed that has no effect because the model brings
                all its weights.
            device: of the parameters; by default the mesh's device; without a mesh that of a captured
                module, or the CPU.
            dtype: of the weights; by default fp32, or that of a module's own weights.

        Returns:
            A tree by canonical path; DTensors if parameters are sharded.
        """
        device = self._device({}) if device is None else device
        made_from = self._model.seed_of(seed, device)
        with torch.inference_mode(False):  # not a decorator: warnings would name its frame as the caller's
            made = self._parameters.make(lambda paths: self._model.init_paths(paths, made_from, device, dtype))
            return tree.to_tensordict(made)

    @torch.inference_mode(False)
    def blank(self, dtypes: Mapping[str, torch.dtype], device: torch.device | str | None = None) -> TensorDict:
        """Return uninitialised parameters of this process's ranks, to read values into.

        Args:
            dtypes: by canonical path, of all parameters.
            device: as for `init`.
        """
        spec, device = self._model.spec, self._device({}) if device is None else device
        return tree.to_tensordict(
            self._parameters.make(
                lambda paths: {path: torch.empty(spec[path].shape, dtype=dtypes[path], device=device) for path in paths}
            )
        )

    @torch.inference_mode(False)
    def init_state(self, device: torch.device | str | None = None) -> TensorDict:
        """Return the initial state of this process's layers, see `Model.init_state`; empty if none keeps state.

        `gather` collects the state of all layers, and `place_state` is its inverse.

        Args:
            device: of the state; by default as for `init`.
        """
        device = self._device({}) if device is None else device
        return tree.to_tensordict(self._model.init_state_paths(self._state_spec, device))

    @torch.inference_mode(False)
    def empty_state(self, device: torch.device | str) -> TensorDict:
        """Return zeros with the shapes of this process's state, as caches start."""
        return tree.to_tensordict({path: torch.zeros_like(leaf, device=device) for path, leaf in self._state_spec.items()})

    def device_of(self, params: tree.Nested) -> torch.device:
        """Return the device on which this process computes with these parameters."""
        return self._device(tree.flatten(params))

    @torch.inference_mode(False)
    def place_state(self, full_state: tree.Nested) -> TensorDict:
        """Return a copy of this process's part of a full state tree.

        Raises:
            ModelError: if a path is missing, or has another shape or dtype.
        """
        return tree.to_tensordict({path: leaf.clone() for path, leaf in self._checked(full_state).items()})

    @torch.inference_mode(False)
    def place(self, full_params: tree.Nested) -> TensorDict:
        """Return a copy of this process's part of a full parameter tree (or of any tree with the same paths).

        Raises:
            ModelError: if a path is missing.
        """
        flat = tree.flatten(full_params)
        return tree.to_tensordict(
            self._parameters.make(lambda paths: {path: self._model.lookup(flat, path).clone() for path in paths})
        )

    @torch.inference_mode(False)
    def gather(self, params: tree.Nested) -> TensorDict:
        """Return a copy of the full tree, on every process, from all processes' parts of parameters or gradients.

        Every process calls it.
        """
        flat = {path: self._parameters.full(path, leaf) for path, leaf in tree.flatten(params).items()}
        if self._group is None or self._ranks is None:
            return tree.to_tensordict(flat)
        return tree.to_tensordict(gather_tree(flat, self._ranks, self._group))

    @torch.inference_mode(False)
    def collect(self, params: tree.Nested) -> TensorDict:
        """Return a copy of the full tree on the first process's host; other processes get an empty tree.

        Use it to write the tree: besides its own part, no device holds more than one tensor. Every process calls it.
        """
        flat = tree.flatten(params)

        def whole(path: str) -> Tensor:
            return self._parameters.full(path, flat[path])

        if self._group is None or self._ranks is None or self.mesh is None:
            return tree.to_tensordict({path: whole(path).cpu() for path in flat})
        if self._ranks[0] != self.mesh.mesh.flatten()[0]:
            for path in flat:  # outside the first process's pp group: only take part in the gathers
                whole(path)
            return tree.to_tensordict({})
        layouts = {path: (tuple(self._parameters.full_shape(path, leaf)), leaf.dtype) for path, leaf in flat.items()}
        return tree.to_tensordict(collect_tree(layouts, whole, self._ranks, self._group, self._device(flat)))

    def global_norm(self, grads: tree.Nested) -> Tensor:
        """Return the 2-norm of all gradients of the model: 0-dim fp32, equal on every process; tied ones count once.

        Every process calls it.
        """
        flat = tree.flatten(grads)
        owned = {path: leaf for path, leaf in flat.items() if path in self._owned}
        return global_norm(owned, self._parameters.mesh, self._device(flat))

    @torch.inference_mode(False)
    def clip(self, grads: tree.Nested, max_norm: float) -> tuple[TensorDict, Tensor]:
        """Scale gradients so that their global norm is at most `max_norm`; return them and the norm before.

        Every process calls it. The host does not wait for the norm.
        """
        norm = self.global_norm(grads)
        return self.scaled(grads, norm, max_norm), norm

    def scaled(self, grads: tree.Nested, norm: Tensor, max_norm: float) -> TensorDict:
        """Scale gradients with a known `global_norm` so that it is at most `max_norm`."""
        return tree.to_tensordict(clip_by_norm(tree.flatten(grads), norm, max_norm))

    @property
    def _model(self) -> Model:
        return self.stages[0].model

    @cached_property
    def _owned(self) -> set[str]:
        """Paths of parameters that no earlier pp rank holds."""
        first = min(self.local_ranks)
        before = (stage for stage in self.stages if self.schedule.placement[stage.index] < first)
        return set(self._parameters.paths).difference(*(stage.paths for stage in before))

    def _checked(self, state: tree.Nested | None) -> dict[str, Tensor]:
        """Return the state of this process's ranks, flat, after checking it."""
        flat = given_state(self._state_spec, state, self._model.title, "pipe.init_state()")
        return {path: flat[path].detach() for path in self._state_spec}

    @cached_property
    def _state_spec(self) -> dict[str, Tensor]:
        """Shapes and dtypes of this process's state."""
        own = {path for stage in self._local_stages for path in stage.states}
        return {path: leaf for path, leaf in self._model.state_spec.items() if path in own}

    @property
    def _group(self) -> ProcessGroup | None:
        return self.mesh.get_group("pp") if self.mesh is not None else None

    def _device(self, leaves: Mapping[str, Any]) -> torch.device:
        """Return the mesh's device; without a mesh that of the first tensor, or the model's."""
        if self.mesh is not None and self.mesh.device_type != "cpu":
            return torch.device(self.mesh.device_type, torch.accelerator.current_device_index())
        given = (leaf for leaf in tree.leaves_and_spec(leaves)[0] if isinstance(leaf, Tensor) and not leaf.is_meta)
        first = next(given, None)
        if self.mesh is not None:
            return torch.device("cpu")
        return first.device if first is not None else self._model.device
