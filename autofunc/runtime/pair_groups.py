"""A two-rank communicator for each directed pair of pp ranks, connected before anything is sent.

`torch.distributed.new_group(use_local_synchronization=True)` would be the public way. It names a group after the number
of groups its process already knows, which differs between ranks with different partners: then the two ends wait for each
other forever. So the backends are created here directly, over the store of the pp group, under names that both ends know.
Private parts of torch used, tried with 2.13.0: `Options._timeout`, `FakeProcessGroup`.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from autofunc.errors import AutofuncError, MeshError
from autofunc.mesh import timeout_of

Pair = tuple[int, int]
"""(sending pp rank, receiving pp rank): ranks 0 and 1 of their group."""


@dataclass(frozen=True)
class Transfers:
    """Options of the transfers between pp ranks.

    Args:
        max_ctas: most GPU blocks per transfer (NCCL's `maxCTAs`); None leaves it to NCCL. Fewer blocks leave more of the
            GPU for computations.
        high_priority: run transfers on high-priority streams.
        sends_block: lower schedules so that they complete even if a send blocks its rank until the receive is posted: for
            transports without buffers. Receives that would deadlock two ranks are posted earlier, which may take more
            memory for received values (0.3 slots per rank on average over named schedules, at most 6). gloo, NCCL and
            sockets, whose sends return at once, do not need it.
        sockets: on CPU, send messages of up to 1 MiB between ranks of one machine over Unix sockets. False leaves all
            messages to gloo.

    Raises:
        AutofuncError: for a `max_ctas` below 1.
    """

    max_ctas: int | None = None
    high_priority: bool = False
    sends_block: bool = False
    sockets: bool = True

    def __post_init__(self) -> None:
        if self.max_ctas is not None and self.max_ctas < 1:
            raise AutofuncError(f"transfers: max_ctas={self.max_ctas}, expected 1 or more")


@dataclass
class _Group:
    """A communicator and its users, until each of them disconnects.

    Weak references would not do: whether a user that was dropped without disconnecting still counts would depend on each
    rank's garbage collector, and then one end would shut down what the other one keeps.
    """

    backend: Any  # a c10d backend with `send(tensors, rank, tag)` and `recv(tensors, rank, tag)`, which return a `Work`
    users: set[object] = field(default_factory=set)


@dataclass
class _Known:
    """The communicators of a pp group. Connections are costly, and the pipelines of a mesh run one after the other on every
    rank, so they share each communicator until its last user is closed."""

    groups: dict[tuple[Pair, torch.device, Transfers], _Group] = field(default_factory=dict)
    made: dict[Pair, int] = field(default_factory=dict)  # number of the last one; the store keeps earlier ones' keys


_known: WeakKeyDictionary[dist.ProcessGroup, _Known] = WeakKeyDictionary()


def connect(
    pp_group: dist.ProcessGroup, pairs: Sequence[Pair], device: torch.device, options: Transfers, user: object
) -> dict[Pair, Any]:  # fmt: skip
    """Connect this rank's communicators among the pairs. All ranks of the pairs call it.

    Connecting waits for the other end. All ranks connect the pairs in the same order, which avoids deadlocks.

    Args:
        pp_group: the process group of the pp axis.
        pairs: of the whole pipeline; only this rank's own are connected.
        device: of the tensors; decides between gloo and nccl.
        options: of the transfers.
        user: stands for whoever uses them, and is held until `disconnect`.

    Returns:
        By pair: a c10d backend in which the sender is rank 0 and the receiver rank 1.

    Raises:
        MeshError: if there is no transport for the device.
    """
    known = _known.setdefault(pp_group, _Known())
    found = {}
    for pair in sorted(set(pairs)):
        if pp_group.rank() not in pair:
            continue
        key = (pair, device, replace(options, sends_block=False, sockets=True))  # which do not concern communicators
        if key not in known.groups:
            number = known.made[pair] = known.made.get(pair, -1) + 1
            known.groups[key] = _Group(_made(pp_group, pair, number, device, options))
        known.groups[key].users.add(user)
        found[pair] = known.groups[key].backend
    return found


def disconnect(pp_group: dist.ProcessGroup, user: object) -> None:
    """Shut down the communicators that only this user needs. All ranks call it, with no transfer in flight."""
    known = _known.get(pp_group, _Known())
    for key, group in list(known.groups.items()):
        group.users.discard(user)
        if not group.users:
            _shut_down(key[1], known.groups.pop(key))


def disconnect_all() -> None:
    """Shut down all NCCL communicators. All ranks call it, with no transfer in flight. gloo groups need no shutdown."""
    for known in list(_known.values()):
        for key in [key for key in known.groups if key[1].type == "cuda"]:
            _shut_down(key[1], known.groups.pop(key))


def _shut_down(device: torch.device, group: _Group) -> None:
    if device.type == "cuda":  # a gloo group ends with its last reference
        group.backend.shutdown()


def _made(
    pp_group: dist.ProcessGroup, pair: Pair, number: int, device: torch.device, options: Transfers
) -> Any:  # fmt: skip
    own = pair.index(pp_group.rank())
    if dist.get_backend(pp_group) == "fake":  # torch's group without communication: for running one rank alone
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
    """Return an NCCL communicator, connected eagerly: otherwise the first transfer would connect it and block its host."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=transfers.high_priority)
    options._timeout = timeout
    if transfers.max_ctas is not None:
        options.config.min_ctas, options.config.max_ctas = 1, transfers.max_ctas
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


@atexit.register
def _abort_all() -> None:
    """Abort all NCCL communicators: none may be alive at exit. After an error the other end may be gone, so don't wait."""
    for known in list(_known.values()):
        for (_, device, _), group in known.groups.items():
            if device.type == "cuda":
                group.backend.abort()
        known.groups.clear()
