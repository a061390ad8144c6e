"""How values travel between pp ranks: in the memory of one process, or by `torch.distributed`.

Both transports have the same four verbs. `send` and `receive` post and return a ticket; `arrived` says whether a
receive's ticket is done (the distributed one blocks until it is, so it is never False there); `take` gives its tensors.
`settle` waits until a send's memory may be reused.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.errors import PeerLostError
from autofunc.runtime.edge_groups import edge_group
from autofunc.runtime.program import Channel

_SOURCE, _TARGET = 0, 1  # ranks within an edge's group


class Transport(Protocol):
    """What the executor needs of a transport."""

    def send(self, channel: Channel, tensors: list[Tensor]) -> Any:
        """Post a send; returns a ticket for `settle`."""
        ...

    def receive(self, channel: Channel) -> Any:
        """Post a receive; returns a ticket for `arrived` and `take`."""
        ...

    def broadcast(self, root: int, tensors: list[Tensor]) -> Any:
        """Give the root's tensors to all pp ranks; on other ranks `tensors` are buffers of the same shapes."""
        ...

    def arrived(self, ticket: Any) -> bool:
        """Whether a receive or broadcast is complete."""
        ...

    def take(self, ticket: Any) -> list[Tensor]:
        """The tensors of a complete receive or broadcast."""
        ...

    def settle(self, ticket: Any) -> None:
        """Wait until a send is complete."""
        ...


class _Ticket:
    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor] | None = None) -> None:
        self.tensors = tensors


class MemoryHub:
    """What the ranks of one process share."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.sent: dict[str, deque[list[Tensor]]] = defaultdict(deque)
        self.posted: dict[str, deque[_Ticket]] = defaultdict(deque)
        self.delivered = 0  # counts deliveries, so that the scheduler of coroutines can tell waiting from a deadlock

    def meet(self, name: str) -> None:
        """Deliver what has been both sent and posted."""
        sent, posted = self.sent[name], self.posted[name]
        while sent and posted:
            posted.popleft().tensors = sent.popleft()
            self.delivered += 1


class MemoryTransport:
    """One rank's end of a `MemoryHub`: tensors are handed over, not copied."""

    def __init__(self, hub: MemoryHub, rank: int) -> None:
        self._hub = hub
        self._rank = rank

    def send(self, channel: Channel, tensors: list[Tensor]) -> None:
        """See `Transport.send`."""
        self._hub.sent[channel.name].append(tensors)
        self._hub.meet(channel.name)

    def receive(self, channel: Channel) -> _Ticket:
        """See `Transport.receive`."""
        ticket = _Ticket()
        self._hub.posted[channel.name].append(ticket)
        self._hub.meet(channel.name)
        return ticket

    def broadcast(self, root: int, tensors: list[Tensor]) -> _Ticket:
        """See `Transport.broadcast`."""
        if self._rank != root:
            return self.receive(Channel(f"broadcast to {self._rank}", root, self._rank, (), ()))
        for target in range(self._hub.num_ranks):
            if target != root:
                self.send(Channel(f"broadcast to {target}", root, target, (), ()), tensors)
        return _Ticket(tensors)

    def arrived(self, ticket: _Ticket) -> bool:
        """See `Transport.arrived`."""
        return ticket.tensors is not None

    def take(self, ticket: _Ticket) -> list[Tensor]:
        """See `Transport.take`."""
        assert ticket.tensors is not None
        return ticket.tensors

    def settle(self, ticket: None) -> None:
        """Handing over completes at once."""


@contextmanager
def _peer() -> Iterator[None]:
    """Say of a failing transfer that it is a consequence: the cause is at the other end."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"the other end of a transfer is gone or too late: {error}") from error


class _Transfer:
    __slots__ = ("tensors", "works")

    def __init__(self, tensors: list[Tensor], works: list[dist.Work]) -> None:
        self.tensors = tensors
        self.works = works

    def wait(self) -> None:
        with _peer():
            for work in self.works:
                work.wait()
        self.works = []


class DistributedTransport:
    """Point-to-point transfers of `torch.distributed` (gloo or nccl), one process group per directed edge.

    Groups are made in the order of `channels`, which must be the same on every rank: making one waits for the other end.

    Args:
        pp_group: the process group of this process's pp axis.
        ranks: global ranks along it, by pp rank.
        rank: this process's pp rank.
        device: where received tensors are made.
        channels: all channels of the pipeline; only this rank's own get groups.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        channels: Sequence[Channel],
    ) -> None:
        self._pp_group = pp_group
        self._ranks = ranks
        self._device = device
        with _peer():
            self._group = {
                channel: edge_group(pp_group, channel.name, channel.source, channel.target, device)
                for channel in channels
                if rank in (channel.source, channel.target)
            }

    def send(self, channel: Channel, tensors: list[Tensor]) -> _Transfer:
        """See `Transport.send`."""
        group = self._group[channel]
        tensors = [tensor.contiguous() for tensor in tensors]
        with _peer():
            return _Transfer(tensors, [group.send([tensor], _TARGET, 0) for tensor in tensors])

    def receive(self, channel: Channel) -> _Transfer:
        """See `Transport.receive`."""
        group = self._group[channel]
        described = zip(channel.shapes, channel.dtypes, strict=True)
        tensors = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in described]
        with _peer():
            return _Transfer(tensors, [group.recv([tensor], _SOURCE, 0) for tensor in tensors])

    def broadcast(self, root: int, tensors: list[Tensor]) -> _Transfer:
        """See `Transport.broadcast`."""
        with _peer():
            works = [dist.broadcast(t, self._ranks[root], group=self._pp_group, async_op=True) for t in tensors]
        return _Transfer(tensors, [work for work in works if work is not None])

    def arrived(self, ticket: _Transfer) -> bool:
        """Blocks until it is: a rank of its own process waits in program order."""
        ticket.wait()
        return True

    def take(self, ticket: _Transfer) -> list[Tensor]:
        """See `Transport.take`."""
        return ticket.tensors

    def settle(self, ticket: _Transfer) -> None:
        """See `Transport.settle`."""
        ticket.wait()
