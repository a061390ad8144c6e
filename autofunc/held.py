"""What a process holds of the trees of a pipeline: made, placed, gathered, and gradients clipped."""

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
from autofunc.errors import ModelError, some_of
from autofunc.mesh import pp_ranks
from autofunc.model import Model, check_state
from autofunc.runtime.collect import collect_tree
from autofunc.runtime.gather import gather_tree
from autofunc.schedule import Schedule
from autofunc.shard import Sharding
from autofunc.shard.norm import clip_by_norm, global_norm
from autofunc.shard.parameters import Parameters
from autofunc.splitting import Stage


class Held:
    """The part of a pipeline that knows which parameters and which state its process holds; it holds none itself.

    Args:
        stages: all of them.
        schedule: which rank has which stage.
        mesh: see `af.pipeline`.
        sharding: see `af.pipeline`.
        parameters: of another pipeline on the same stages; None makes them.
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
        """The initial parameters of this process's ranks: the same values in every layout.

        A captured module's own weights, and stored ones, are copied; others are made from the seed. `explain` says which.

        Args:
            seed: of the weights; by default 0. A `UserWarning` says so when the model has all of its own, and the seed is
                not used.
            device: where they are made and live; by default the mesh's device; without a mesh that of a captured
                module, or the CPU.
            dtype: of the weights; by default fp32, or what a module's own weights have.

        Returns:
            A tree by canonical path; DTensors where parameters are sharded.
        """
        device = self._device({}) if device is None else device
        made_from = self._model.seed_of(seed, device)
        with torch.inference_mode(False):  # and not as a decorator, whose frame a warning would name as the caller's
            made = self._parameters.make(lambda paths: self._model.init_paths(paths, made_from, device, dtype))
            return tree.to_tensordict(made)

    @torch.inference_mode(False)
    def blank(self, dtypes: Mapping[str, torch.dtype], device: torch.device | str | None = None) -> TensorDict:
        """Parameters of this process's ranks without values, to read some into.

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
        """The state that this process's layers begin with, see `Model.init_state`; empty where none keeps any.

        `gather` gives the state of all layers, and `place_state` is its opposite.

        Args:
            device: where it is made; by default as for `init`.
        """
        device = self._device({}) if device is None else device
        return tree.to_tensordict(self._model.init_state_paths(self._state_spec, device))

    @torch.inference_mode(False)
    def empty_state(self, device: torch.device | str) -> TensorDict:
        """Zeros in the place of this process's state: what caches begin with."""
        return tree.to_tensordict({path: torch.zeros_like(leaf, device=device) for path, leaf in self._state_spec.items()})

    def device_of(self, params: tree.Nested) -> torch.device:
        """Where this process computes with these parameters of its ranks."""
        return self._device(tree.flatten(params))

    @torch.inference_mode(False)
    def place_state(self, full_state: tree.Nested) -> TensorDict:
        """A copy of this process's part of a full tree of state.

        Raises:
            ModelError: when a path is missing, or has another shape or dtype.
        """
        return tree.to_tensordict({path: leaf.clone() for path, leaf in self._checked(full_state).items()})

    @torch.inference_mode(False)
    def place(self, full_params: tree.Nested) -> TensorDict:
        """A copy of this process's part of a full tree of parameters (or of any tree with the same paths).

        Raises:
            ModelError: when a path is missing.
        """
        flat = tree.flatten(full_params)
        return tree.to_tensordict(
            self._parameters.make(lambda paths: {path: self._model.lookup(flat, path).clone() for path in paths})
        )

    @torch.inference_mode(False)
    def gather(self, params: tree.Nested) -> TensorDict:
        """A copy of the full tree, on every process, from each process's part of parameters or gradients.

        Every process calls it.
        """
        flat = {path: self._parameters.full(path, leaf) for path, leaf in tree.flatten(params).items()}
        if self._group is None or self._ranks is None:
            return tree.to_tensordict(flat)
        return tree.to_tensordict(gather_tree(flat, self._ranks, self._group))

    @torch.inference_mode(False)
    def collect(self, params: tree.Nested) -> TensorDict:
        """A copy of the full tree for the first process alone, on its host; the others get an empty one.

        To write it: no device holds more of it than one tensor beside its own part. Every process calls it.
        """
        flat = tree.flatten(params)

        def whole(path: str) -> Tensor:
            return self._parameters.full(path, flat[path])

        if self._group is None or self._ranks is None or self.mesh is None:
            return tree.to_tensordict({path: whole(path).cpu() for path in flat})
        if self._ranks[0] != self.mesh.mesh.flatten()[0]:
            for path in flat:  # the first process's part of the data, or of its tensors, goes on without this one
                whole(path)
            return tree.to_tensordict({})
        layouts = {path: (tuple(self._parameters.full_shape(path, leaf)), leaf.dtype) for path, leaf in flat.items()}
        return tree.to_tensordict(collect_tree(layouts, whole, self._ranks, self._group, self._device(flat)))

    def global_norm(self, grads: tree.Nested) -> Tensor:
        """The 2-norm of all gradients of the model: 0-dim fp32, the same on every process; a tied one counts once.

        Every process calls it.
        """
        flat = tree.flatten(grads)
        owned = {path: leaf for path, leaf in flat.items() if path in self._owned}
        return global_norm(owned, self._parameters.mesh, self._device(flat))

    @torch.inference_mode(False)
    def clip(self, grads: tree.Nested, max_norm: float) -> tuple[TensorDict, Tensor]:
        """Scale gradients so that their global norm is at most `max_norm`; returns them and the norm before.

        Every process calls it. Nothing waits for the norm on the host.
        """
        norm = self.global_norm(grads)
        return self.scaled(grads, norm, max_norm), norm

    def scaled(self, grads: tree.Nested, norm: Tensor, max_norm: float) -> TensorDict:
        """Gradients of a known `global_norm`, scaled so that it is at most `max_norm`."""
        return tree.to_tensordict(clip_by_norm(tree.flatten(grads), norm, max_norm))

    @property
    def _model(self) -> Model:
        return self.stages[0].model

    @cached_property
    def _owned(self) -> set[str]:
        """Paths of the parameters that no pp rank before this process's holds."""
        first = min(self.local_ranks)
        before = (stage for stage in self.stages if self.schedule.placement[stage.index] < first)
        return set(self._parameters.paths).difference(*(stage.paths for stage in before))

    def _checked(self, state: tree.Nested | None) -> dict[str, Tensor]:
        """The state of this process's ranks, flat."""
        spec = self._state_spec
        if state is None and spec:
            raise ModelError(
                f"{self._model.title} keeps state ({some_of(spec)}): give state=pipe.init_state(), or what the last step "
                "returned"
            )
        flat = {} if state is None else tree.flatten(state)
        check_state(spec, flat)
        return {path: flat[path].detach() for path in spec}

    @cached_property
    def _state_spec(self) -> dict[str, Tensor]:
        """Of this process's ranks."""
        own = {path for stage in self._local_stages for path in stage.states}
        return {path: leaf for path, leaf in self._model.state_spec.items() if path in own}

    @property
    def _group(self) -> ProcessGroup | None:
        return self.mesh.get_group("pp") if self.mesh is not None else None

    def _device(self, leaves: Mapping[str, Any]) -> torch.device:
        """The mesh's; without one that of the first tensor, or the model's."""
        if self.mesh is not None and self.mesh.device_type != "cpu":
            return torch.device(self.mesh.device_type, torch.accelerator.current_device_index())
        given = (leaf for leaf in tree.leaves_and_spec(leaves)[0] if isinstance(leaf, Tensor) and not leaf.is_meta)
        first = next(given, None)
        if self.mesh is not None:
            return torch.device("cpu")
        return first.device if first is not None else self._model.device
