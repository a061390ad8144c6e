"""A communicator of two for each directed pair of pp ranks, connected before anything is sent.

`torch.distributed.new_group(use_local_synchronization=True)` would be the public way. It names a group after the number
of groups its process already knows, which differs between ranks that talk to different ones: the two ends then wait for
each other for ever. So the backends are made here directly, over the store of the pp group, under names that both ends
know. Private parts of torch used, tried with 2.13.0: `Options._timeout`, `FakeProcessGroup`.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from autofunc.errors import AutofuncError, MeshError
from autofunc.mesh import timeout_of

Pair = tuple[int, int]
"""(pp rank that sends, pp rank that receives): ranks 0 and 1 of their group."""


@dataclass(frozen=True)
class Transfers:
    """How values travel between pp ranks. gloo, on CPU, has no choices: its sends return at once.

    Args:
        max_ctas: how many blocks of a GPU a transfer may use at most (NCCL's `maxCTAs`); None leaves it to NCCL. With few
            of them more of the GPU is left for computations.
        high_priority: run transfers on streams of high priority.
        sends_block: lower schedules such that they end even where a rank that sends does nothing else until the receive is
            posted: for transports that buffer nothing and block. Receives that two ranks would otherwise wait for in a
            circle are posted earlier, which may take more memory for what is received (0.3 slots a rank on average over
            named schedules, 6 at most). Neither gloo nor NCCL, whose sends return at once, needs it.

    Raises:
        AutofuncError: for a number that is not positive.
    """

    max_ctas: int | None = None
    high_priority: bool = False
    sends_block: bool = False

    def __post_init__(self) -> None:
        if self.max_ctas is not None and self.max_ctas < 1:
            raise AutofuncError(f"transfers: max_ctas={self.max_ctas}, expected 1 or more")


@dataclass
class _Group:
    """A communicator, and who uses it."""

    backend: Any  # a c10d backend with `send(tensors, rank, tag)` and `recv(tensors, rank, tag)`, which return a `Work`
    users: WeakSet[Any] = field(default_factory=WeakSet)


@dataclass
class _Known:
    """The communicators of a pp group. Connections are costly, and pipelines on one mesh run one after the other on every
    rank, so they share them, until the last that uses one is closed."""

    groups: dict[tuple[Pair, torch.device, Transfers], _Group] = field(default_factory=dict)
    made: dict[Pair, int] = field(default_factory=dict)  # how many there have been: a store remembers those before


_known: WeakKeyDictionary[dist.ProcessGroup, _Known] = WeakKeyDictionary()


def connect(
    pp_group: dist.ProcessGroup, pairs: Sequence[Pair], device: torch.device, options: Transfers, user: Any
) -> dict[Pair, Any]:  # fmt: skip
    """The communicators of this rank among some pairs, connected. All ranks of the pairs call it.

    Connecting waits for the other end. All ranks go through the pairs in one order, so nobody waits in a circle.

    Args:
        pp_group: the process group of the pp axis.
        pairs: of the whole pipeline; only this rank's own are connected.
        device: where the tensors live: decides between gloo and nccl.
        options: of the transfers.
        user: for whom; see `disconnect`.

    Returns:
        By pair: a c10d backend in which the sender is rank 0 and the receiver rank 1.
    """
    known = _known.setdefault(pp_group, _Known())
    found = {}
    for pair in sorted(set(pairs)):
        if pp_group.rank() not in pair:
            continue
        key = (pair, device, replace(options, sends_block=False))  # which is the schedules', not the connection's
        if key not in known.groups:
            number = known.made[pair] = known.made.get(pair, -1) + 1
            known.groups[key] = _Group(_made(pp_group, pair, number, device, options))
        known.groups[key].users.add(user)
        found[pair] = known.groups[key].backend
    return found


def disconnect(pp_group: dist.ProcessGroup, user: Any) -> None:
    """Shut down what nobody but this user is connected by. All ranks call it, with nothing under way."""
    known = _known.get(pp_group, _Known())
    for key, group in list(known.groups.items()):
        group.users.discard(user)
        if not group.users:
            _shut_down(key[1], known.groups.pop(key))


def disconnect_all() -> None:
    """Shut down all communicators of NCCL. All ranks call it, with nothing under way. Groups of gloo end by themselves."""
    for known in list(_known.values()):
        for key in [key for key in known.groups if key[1].type == "cuda"]:
            _shut_down(key[1], known.groups.pop(key))


def _shut_down(device: torch.device, group: _Group) -> None:
    if device.type == "cuda":  # a group of gloo ends when nobody holds it
        group.backend.shutdown()


def _made(
    pp_group: dist.ProcessGroup, pair: Pair, number: int, device: torch.device, options: Transfers
) -> Any:  # fmt: skip
    own = pair.index(pp_group.rank())
    if dist.get_backend(pp_group) == "fake":  # torch's group that sends nowhere: for measuring and trying one rank alone
        return FakeProcessGroup._create_internal(own, 2)
    store = PrefixStore(f"autofunc/pair {pair[0]} {pair[1]}/{number}", pp_group.get_group_store())
    timeout = timeout_of(pp_group, device)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, own, 2, timeout=timeout)
    if device.type == "cuda":
        return nccl_group(store, own, 2, timeout, options, device)
    raise MeshError(f"there is no transport between {device.type} devices; expected cpu (gloo) or cuda (nccl)")


def nccl_group(
    store: dist.Store, rank: int, size: int, timeout: timedelta, transfers: Transfers, device: torch.device
) -> Any:  # fmt: skip
    """A communicator of NCCL, which would else be connected by the first transfer, that would then block its host."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=transfers.high_priority)
    options._timeout = timeout
    if transfers.max_ctas is not None:
        options.config.min_ctas, options.config.max_ctas = 1, transfers.max_ctas
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


@atexit.register
def _abort_all() -> None:
    """At exit no communicator of NCCL may be alive. After an error the other end may be gone, so nothing waits for it."""
    for known in list(_known.values()):
        for (_, device, _), group in known.groups.items():
            if device.type == "cuda":
                group.backend.abort()
        known.groups.clear()
