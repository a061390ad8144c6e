"""Parameters sharded over the dp_shard axis, stored and gathered by torch's `fully_shard`.

Each layer's parameters are held by a separate small module, its own root, so that `unshard()` and `reshard()` are plain
calls and the gathers of several layers overlap computing. HSDP, mixed precision, offload and a tp axis come with it.
Gradients do not go through it: they would be rounded to the parameters' precision first (see `reduce.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard

from autofunc.shard.dtensors import local
from autofunc.shard.options import Sharding

Group = tuple[str, ...]
"""Canonical paths of parameters that are gathered together: those of one layer."""

_KEPT = 2  # trees whose storage a pipeline keeps; further trees are copied into a separate storage in each step


class _Holder(nn.Module):
    """The parameters of one layer; nothing calls it."""

    def __init__(self, locals_: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {path: f"p{number}" for number, path in enumerate(locals_)}
        for path, leaf in locals_.items():
            self.register_parameter(self.names[path], nn.Parameter(leaf, requires_grad=False))

    def get(self, path: str) -> Tensor:
        """Return the parameter in its current form: sharded or gathered."""
        return self.get_parameter(self.names[path]).detach()


class ShardedTree:
    """The storage of one tree of sharded parameters.

    Args:
        groups: the parameters that are gathered together.
        make: returns the parameters of a group, whole over the dp_shard axis (but already cut over tp).
        mesh_of: returns a group's mesh: of the axis that shards it, or of dp_replicate and that axis.
        sharding: the precision and offload policies.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        make: Callable[[Group], Mapping[str, Tensor]],
        mesh_of: Callable[[Group], DeviceMesh],
        sharding: Sharding,
    ) -> None:
        self._holders: dict[Group, Any] = {}
        for group in groups:  # one layer at a time, so that only one is whole
            made = make(group)
            holder = _Holder({path: made[path] for path in group})  # in the same order on every rank
            fully_shard(
                holder,
                mesh=mesh_of(group),
                reshard_after_forward=False,
                mp_policy=sharding.mp_policy,
                offload_policy=sharding.offload_policy,
            )
            self._holders[group] = holder
        self._home = {path: group for group in groups for path in group}
        self.sharded = {path: self._holders[group].get(path) for path, group in self._home.items()}
        self._places = {path: _place(leaf) for path, leaf in self.sharded.items()}
        self._users: dict[Group, int] = dict.fromkeys(groups, 0)
        self._gathering: dict[Group, UnshardHandle] = {}
        self._whole: dict[str, Tensor] = {}  # from the first gather on; their memory comes and goes

    def holds(self, flat: Mapping[str, Tensor]) -> bool:
        """Return whether these leaves lie in this storage."""
        return all(_place(flat[path]) == place for path, place in self._places.items())

    def is_like(self, flat: Mapping[str, Tensor]) -> bool:
        """Return whether leaves have the dtypes of this storage."""
        return all(flat[path].dtype == leaf.dtype for path, leaf in self.sharded.items())

    @torch.no_grad()
    def load(self, flat: Mapping[str, Tensor]) -> None:
        """Copy leaves with this storage's layout into it."""
        for path, leaf in self.sharded.items():
            local(leaf).copy_(local(flat[path]))

    def gather(self, groups: Sequence[Group]) -> None:
        """Start to gather groups, for one more user each. Groups already in use need no gather."""
        for group in groups:
            self._users[group] += 1
            if self._users[group] == 1:
                holder: FSDPModule = self._holders[group]
                handle = holder.unshard(async_op=True)
                if handle is not None:
                    self._gathering[group] = handle

    def whole(self, path: str) -> Tensor:
        """Return a parameter, whole over dp_shard and local over tp; it may still be in transit."""
        if path not in self._whole:
            group = self._home[path]
            self.arrive([group])
            self._whole.update({each: local(self._holders[group].get(each)) for each in group})
        return self._whole[path]

    def arrive(self, groups: Iterable[Group]) -> None:
        """Wait for gathers in progress."""
        for group in groups:
            handle = self._gathering.pop(group, None)
            if handle is not None:
                handle.wait()

    def release(self, groups: Sequence[Group]) -> None:
        """Free gathered parameters that have no other user."""
        for group in groups:
            self._users[group] -= 1
            if self._users[group] == 0:
                self.arrive([group])
                self._holders[group].reshard()

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters in memory, sharded or gathered; gathers in progress do not count."""
        leaves = [*self.sharded.values(), *(holder.get(path) for group, holder in self._holders.items() for path in group)]
        storages = (local(leaf).untyped_storage() for leaf in leaves)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())

    def release_all(self) -> None:
        """Free everything gathered: after a failed step."""
        for group, users in self._users.items():
            if users:
                self._users[group] = 1
                self.release([group])


class Storages:
    """The storages behind the trees that a pipeline works on.

    Trees that it made itself are used in place. Any other tree, such as an average of several, is copied: parameters
    are arguments, and a call must not change those of an earlier one.
    """

    def __init__(
        self,
        make: Callable[[Callable[[Group], Mapping[str, Tensor]]], ShardedTree],
        blank: Callable[[Group, Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> None:
        self._make, self._blank = make, blank
        self._own: OrderedDict[int, ShardedTree] = OrderedDict()
        self._copy: ShardedTree | None = None

    def add(self, make: Callable[[Group], Mapping[str, Tensor]]) -> ShardedTree:
        """Make storage for a new tree."""
        tree = self._make(make)
        self._own[id(tree)] = tree
        if len(self._own) > _KEPT:
            self._own.popitem(last=False)
        return tree

    def of(self, flat: Mapping[str, Tensor]) -> ShardedTree:
        """Return the storage that holds these leaves, or that they are copied into."""
        for key, tree in reversed(self._own.items()):
            if tree.holds(flat):
                self._own.move_to_end(key)
                return tree
        if self._copy is None or not self._copy.is_like(flat):
            self._copy = self._make(lambda group: self._blank(group, flat))
        if not self._copy.holds(flat):
            self._copy.load(flat)
        return self._copy


def _place(leaf: Tensor) -> int:
    return local(leaf).data_ptr()
