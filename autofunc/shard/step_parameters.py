"""How a step gets the parameters of its stages: gathered if they are sharded, else cast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from autofunc.shard.dtensors import local
from autofunc.shard.fsdp import ShardedTree
from autofunc.splitting import Stage

if TYPE_CHECKING:
    from autofunc.shard.parameters import Parameters


class StepParameters:
    """The parameters of stages during one step.

    Args:
        parameters: how this process holds them.
        flat: the leaves of this step.
        storage: of sharded parameters; None if they are not sharded.
    """

    def __init__(self, parameters: Parameters, flat: Mapping[str, Tensor], storage: ShardedTree | None) -> None:
        self._parameters, self._flat, self._storage = parameters, flat, storage
        self._cast: dict[str, Tensor] = {}

    def gather(self, stage: int) -> None:
        """Start to gather a stage's parameters."""
        if self._storage is not None:
            self._storage.gather(self._parameters._groups_of[stage])

    def release(self, stage: int) -> None:
        """Free a stage's gathered parameters."""
        if self._storage is not None:
            self._storage.release(self._parameters._groups_of[stage])

    def leaves(self, stage: Stage) -> list[Tensor]:
        """Return local tensors for all holders of a stage, in order; sharded ones may still be in transit."""
        canonical = (self._parameters.model.canonical(path) for path in stage.holders)
        if self._storage is not None:
            storage = self._storage
            spec = self._parameters.model.spec
            return [storage.whole(path).view(()) if not spec[path].dim() else storage.whole(path) for path in canonical]
        return [self._cast_once(path) for path in canonical]

    def ready(self, stage: int) -> Callable[[int], None] | None:
        """Return a function that waits for the parameters of a layer, given its position; None if nothing is gathered."""
        if self._storage is None:
            return None
        arrive, groups = self._storage.arrive, self._parameters._groups_by_layer[stage]
        return lambda layer: arrive(groups[layer])

    def arrive(self, stage: int) -> None:
        """Wait until all of a stage's parameters are gathered."""
        if self._storage is not None:
            self._storage.arrive(self._parameters._groups_of[stage])

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters in memory."""
        if self._storage is not None:
            return self._storage.num_bytes
        held = [local(self._parameters.model.lookup(self._flat, path)) for path in self._parameters.paths]
        return sum(leaf.numel() * leaf.element_size() for leaf in [*held, *self._cast.values()])

    def end(self) -> None:
        """Free all gathered parameters, after a step or its failure."""
        if self._storage is not None:
            self._storage.release_all()

    def _cast_once(self, path: str) -> Tensor:
        """Return a parameter that needs no gather, cast once per step if at all."""
        leaf = local(self._parameters.model.lookup(self._flat, path)).detach()
        dtype = self._parameters.sharding.precision.parameter_dtype(leaf.dtype)
        if dtype == leaf.dtype:
            return leaf
        if path not in self._cast:
            self._cast[path] = leaf.to(dtype)
        return self._cast[path]
