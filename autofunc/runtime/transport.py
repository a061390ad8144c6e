"""Transfers between pp ranks: in the memory of one process, by `torch.distributed`, or over sockets.

A transport opens a `Port` for each of a rank's channels. Ports post sends and receives, which return tickets. `arrived`
tells whether a receive is complete (the distributed one blocks until it is); `settle` waits until a send's memory may be
reused. A ticket holds the tensors until then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.runtime.pair_groups import Transfers, connect, disconnect
from autofunc.runtime.program import Channel
from autofunc.runtime.socket_ports import Lines, SocketLine, is_small, lines, lost_peer

_SOURCE, _TARGET = 0, 1  # ranks within a pair's group


class Ticket(Protocol):
    """A posted transfer."""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors sent; or, once they have arrived, received."""
        ...

    def arrived(self) -> bool:
        """Return whether a receive or broadcast is complete: in memory at once; between processes it blocks until it is.

        Raises:
            PeerLostError: if the other end is gone, or does not arrive within the process group's timeout.
        """
        ...

    def settle(self) -> None:
        """Block until a send is complete, so that the memory of its tensors may be reused.

        Raises:
            PeerLostError: see `arrived`.
        """
        ...


class Port(Protocol):
    """One rank's end of a channel. Messages arrive in the order they were sent."""

    def send(self, tensors: list[Tensor]) -> Ticket:
        """Post a send and return at once. The ticket keeps the tensors, which must not change until it is settled.

        Args:
            tensors: one message.

        Raises:
            PeerLostError: if the other end is known to be gone.
        """
        ...

    def receive(self, into: list[Tensor]) -> Ticket:
        """Post a receive and return at once.

        Args:
            into: contiguous tensors that the next message is written into, of the sent shapes and dtypes.

        Raises:
            PeerLostError: if the other end is known to be gone.
        """
        ...


class Transport(Protocol):
    """The interface between the executor and a transport."""

    def open(self, channel: Channel) -> Port:
        """Return this rank's end of a channel of which it is the source or the target."""
        ...

    def broadcast(self, root: int, tensors: list[Tensor]) -> Ticket:
        """Broadcast the root's tensors to all pp ranks. Every rank calls it, and it returns at once.

        Args:
            root: the pp rank that has them.
            tensors: the tensors to broadcast; on other ranks, tensors of the same shapes and dtypes to write to.

        Raises:
            PeerLostError: if another rank is known to be gone.
        """
        ...


# --- in memory ----------------------------------------------------------------------------------------------------


class _MemoryTicket:
    __slots__ = ("done", "tensors")

    def __init__(self, tensors: list[Tensor], done: bool = False) -> None:
        self.tensors, self.done = tensors, done

    def arrived(self) -> bool:
        return self.done

    def settle(self) -> None:
        """Do nothing: a send is copied when its receive is posted, and the schedule guarantees that this has happened."""


class _Mailbox:
    """Both ends of a channel in one process. Messages are copied, as between processes."""

    def __init__(self, hub: MemoryHub) -> None:
        self._hub = hub
        self._sent: deque[_MemoryTicket] = deque()
        self._posted: deque[_MemoryTicket] = deque()

    def send(self, tensors: list[Tensor]) -> _MemoryTicket:
        """See `Port.send`."""
        ticket = _MemoryTicket(tensors)
        self._sent.append(ticket)
        self._meet()
        return ticket

    def receive(self, into: list[Tensor]) -> _MemoryTicket:
        """See `Port.receive`."""
        ticket = _MemoryTicket(into)
        self._posted.append(ticket)
        self._meet()
        return ticket

    def _meet(self) -> None:
        """Deliver messages whose send and receive are both posted."""
        while self._sent and self._posted:
            source, target = self._sent.popleft(), self._posted.popleft()
            for copy, tensor in zip(target.tensors, source.tensors, strict=True):
                copy.copy_(tensor)
            source.done = target.done = True
            self._hub.delivered += 1


class MemoryHub:
    """The mailboxes that the ranks of one process share during one step."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.delivered = 0  # counts deliveries, so that the coroutine scheduler can tell waiting from deadlock
        self._boxes: dict[object, _Mailbox] = {}

    def box(self, of: object) -> _Mailbox:
        """Return the mailbox of a channel, which holds both ends."""
        if of not in self._boxes:
            self._boxes[of] = _Mailbox(self)
        return self._boxes[of]


class MemoryTransport:
    """One rank's end of a `MemoryHub`."""

    def __init__(self, hub: MemoryHub, rank: int) -> None:
        self._hub = hub
        self._rank = rank

    def open(self, channel: Channel) -> _Mailbox:
        """See `Transport.open`."""
        return self._hub.box(channel)

    def broadcast(self, root: int, tensors: list[Tensor]) -> _MemoryTicket:
        """See `Transport.broadcast`."""
        if self._rank != root:
            return self._hub.box(f"broadcast to {self._rank}").receive(tensors)
        for target in range(self._hub.num_ranks):
            if target != root:
                self._hub.box(f"broadcast to {target}").send(tensors)
        return _MemoryTicket(tensors, done=True)


# --- between processes --------------------------------------------------------------------------------------------


class _Transfer:
    __slots__ = ("tensors", "works")

    def __init__(self, tensors: list[Tensor], works: list[Any]) -> None:
        self.tensors, self.works = tensors, works

    def arrived(self) -> bool:
        """Block until it is: a rank with its own process waits in program order."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise lost_peer(error) from error
        self.works = []
        return True

    def settle(self) -> None:
        self.arrived()


class _GroupPort:
    """One end of a pair's process group."""

    __slots__ = ("_recv", "_send")

    def __init__(self, group: Any) -> None:
        self._send, self._recv = group.send, group.recv

    def send(self, tensors: list[Tensor]) -> _Transfer:
        """See `Port.send`."""
        try:
            if len(tensors) == 1 and tensors[0].is_contiguous():  # the common case, without building lists
                return _Transfer(tensors, [self._send(tensors, _TARGET, 0)])
            tensors = [tensor.contiguous() for tensor in tensors]
            return _Transfer(tensors, [self._send([tensor], _TARGET, 0) for tensor in tensors])
        except RuntimeError as error:
            raise lost_peer(error) from error

    def receive(self, into: list[Tensor]) -> _Transfer:
        """See `Port.receive`."""
        try:
            return _Transfer(into, [self._recv([tensor], _SOURCE, 0) for tensor in into])
        except RuntimeError as error:
            raise lost_peer(error) from error


class _LocalPort:
    """One end of a pair on one machine: small messages go over its socket, others through its gloo group."""

    __slots__ = ("_group", "_line")

    def __init__(self, group: Any, line: SocketLine) -> None:
        self._group, self._line = _GroupPort(group), line

    def send(self, tensors: list[Tensor]) -> Ticket:
        """See `Port.send`."""
        return (self._line if is_small(tensors) else self._group).send(tensors)

    def receive(self, into: list[Tensor]) -> Ticket:
        """See `Port.receive`."""
        return (self._line if is_small(into) else self._group).receive(into)


class _CoalescingPort(_GroupPort):
    """One end of a pair's NCCL communicator: a message's tensors go in one call and one kernel."""

    __slots__ = ("_group",)

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self._group = group

    def send(self, tensors: list[Tensor]) -> _Transfer:
        """See `Port.send`."""
        return super().send(tensors) if len(tensors) == 1 else self._at_once(super().send, tensors)

    def receive(self, into: list[Tensor]) -> _Transfer:
        """See `Port.receive`."""
        return super().receive(into) if len(into) == 1 else self._at_once(super().receive, into)

    def _at_once(self, post: Callable[[list[Tensor]], _Transfer], tensors: list[Tensor]) -> _Transfer:
        self._group._start_coalescing()
        posted = post(tensors)
        return _Transfer(posted.tensors, [self._group._end_coalescing()])


class DistributedTransport:
    """Point-to-point transfers of `torch.distributed` (gloo or nccl), one communicator per directed pair of ranks.

    Construction waits for the other end of each.

    Args:
        pp_group: the process group of this process's pp axis.
        ranks: global ranks along it, by pp rank.
        device: of the tensors.
        channels: all channels of the pipeline; only this rank's own are connected.
        options: of the transfers.

    Raises:
        PeerLostError: if the other end of a pair does not connect.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        ranks: Sequence[int],
        device: torch.device,
        channels: Sequence[Channel],
        options: Transfers,
    ) -> None:
        self._pp_group = pp_group
        self._ranks, self._device = ranks, device
        self._user = object()  # of the connections, which outlive this one if it is dropped without being closed
        try:
            groups = connect(pp_group, channels, device, options, self._user)
            found = lines(pp_group) if device.type == "cpu" and options.sockets else Lines({}, False)
        except (RuntimeError, OSError) as error:
            raise lost_peer(error) from error
        self._lines, self._reach_all = found
        self._ports = {Channel(*pair): self._port(Channel(*pair), group) for pair, group in groups.items()}

    def open(self, channel: Channel) -> Port:
        """See `Transport.open`."""
        return self._ports[channel]

    def flush(self) -> None:
        """At the end of a step, wait until what was sent reaches the other ends even if this process ends.

        Raises:
            PeerLostError: if another end is gone or too late.
        """
        for line in self._lines.values():
            line.flush()

    def abandon(self) -> None:
        """Note that a step failed, which may have left transfers unfinished."""
        for line in self._lines.values():
            line.abandon()

    def _port(self, channel: Channel, group: Any) -> Port:
        if self._device.type == "cuda":
            return _CoalescingPort(group)
        line = next((line for rank, line in self._lines.items() if rank in channel), None)
        return _GroupPort(group) if line is None else _LocalPort(group, line)

    def close(self) -> None:
        """Shut down the communicators without other users. All pp ranks call it, with no transfer in flight.

        Sockets stay until the process group ends.
        """
        self._ports = {}
        disconnect(self._pp_group, self._user)

    def broadcast(self, root: int, tensors: list[Tensor]) -> Ticket:
        """See `Transport.broadcast`."""
        if len(self._ranks) == 1:  # torch would wake a thread for it
            return _Transfer(tensors, [])
        if self._reach_all and is_small(tensors):
            if root in self._lines:
                return self._lines[root].receive(tensors)
            for line in self._lines.values():
                line.send(tensors)
            return _Transfer(tensors, [])
        try:
            works = [dist.broadcast(t, self._ranks[root], group=self._pp_group, async_op=True) for t in tensors]
        except RuntimeError as error:
            raise lost_peer(error) from error
        return _Transfer(tensors, [work for work in works if work is not None])
