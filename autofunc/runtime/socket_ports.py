"""Transfers between pp ranks of one machine over Unix sockets, for small messages on CPU.

A send writes to the kernel's buffer, and a receive reads when its value is needed, both in the rank's own thread. gloo's
threads compete for cores with ranks that compute: a step of small stages takes up to 3.2 times as long over gloo, on as
many cores as ranks (`bench/transfers.py`).

A send never waits for the other end. If the kernel's buffer is full, a thread writes a copy of the rest: of messages
larger than the buffer (0.4 MB by Linux's default settings), and where a rank is far ahead. No memory prediction counts
these copies.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from autofunc.errors import PeerLostError
from autofunc.shard.unix_sockets import bytes_of, connect, fill

_SMALL = 1 << 20
"""Bytes of the largest message that takes a socket."""


def lost_peer(error: BaseException) -> PeerLostError:
    """Return the error of a failed transfer, which marks it as a consequence: the cause is at the other end."""
    return PeerLostError(f"the other end of a transfer is gone or too late: {error}")


class Lines(NamedTuple):
    """The sockets from this rank to others of its pp group."""

    by_rank: dict[int, SocketLine]
    reach_all: bool  # and so do those of all other ranks


# one entry per group, as long as it lives: connecting is costly, and all pipelines on a mesh can share the sockets
_made: WeakKeyDictionary[dist.ProcessGroup, Lines] = WeakKeyDictionary()


def lines(pp_group: dist.ProcessGroup) -> Lines:
    """Connect the ranks of a pp group that are on one machine, once; all of them call it."""
    if pp_group not in _made:
        peers, is_whole = connect(pp_group)
        _made[pp_group] = Lines({rank: SocketLine(peer) for rank, peer in peers.items()}, is_whole)
    return _made[pp_group]


def is_small(message: Sequence[Tensor]) -> bool:
    """Return whether a message goes over a socket. Both ends know its size, so they agree."""
    return sum([tensor.nbytes for tensor in message]) <= _SMALL


class _Sent:
    """A message whose bytes are in the kernel's buffer, or copied, so that its memory may be reused."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def arrived(self) -> bool:
        return True

    def settle(self) -> None:
        """Do nothing."""


class _Expected:
    """A message to be read."""

    __slots__ = ("_line", "done", "tensors")

    def __init__(self, tensors: list[Tensor], line: SocketLine) -> None:
        self.tensors, self._line, self.done = tensors, line, False

    def arrived(self) -> bool:
        """Block until it is read, after the messages before it."""
        if not self.done:
            self._line.read(self)
        return True

    def settle(self) -> None:
        self.arrived()


class SocketLine:
    """One end of the socket between two ranks. Messages arrive in the order they were sent.

    Messages are bytes without a length. So a line that failed, or was given up in the middle of one, raises from then on.
    """

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._expected: deque[_Expected] = deque()
        self._writer: _Writer | None = None  # made when it is first needed
        self._failure = ""

    def send(self, tensors: list[Tensor]) -> _Sent:
        """See `Port.send`."""
        with self._in_use():
            for tensor in tensors:
                self._write(bytes_of(tensor.contiguous().resolve_conj().resolve_neg()))
        return _Sent(tensors)

    def receive(self, into: list[Tensor]) -> _Expected:
        """See `Port.receive`."""
        ticket = _Expected(into, self)
        self._expected.append(ticket)
        return ticket

    def read(self, last: _Expected) -> None:
        """Read expected messages up to this one."""
        with self._in_use():
            while not last.done:
                ticket = self._expected.popleft()
                for tensor in ticket.tensors:
                    fill(self._peer, bytes_of(tensor))
                ticket.done = True

    def flush(self) -> None:
        """Wait until all sent bytes are in the kernel's buffer, from which the other end can read them even if this process
        ends. Not to be called while the other end may wait for a later send.

        Raises:
            PeerLostError: if they could not be written.
        """
        if self._writer is not None:
            with self._in_use():
                self._writer.finish()

    def abandon(self) -> None:
        """Note that a step failed. If it has not read all it was to read, what arrives next belongs to no one."""
        if self._expected:
            self._failure = self._failure or "an earlier step failed before it had read all that was sent to it"

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. What was not flushed is lost."""
        if self._writer is not None:
            self._writer.stop()
        self._peer.close()

    def _write(self, left: memoryview) -> None:
        if self._writer is None or self._writer.is_idle():
            try:
                written = self._peer.send(left, socket.MSG_DONTWAIT)
            except BlockingIOError:
                written = 0  # the buffer is full
            left = left[written:]
        if left:
            self._writer = self._writer or _Writer(self._peer)
            self._writer.write(bytes(left))

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Refuse a line that has failed; mark it if it fails now."""
        if self._failure:
            raise PeerLostError(f"the connection to another pp rank cannot be used any more: {self._failure}")
        try:
            yield
        except BlockingIOError as error:
            self._failure = "the other end was too late"
            raise PeerLostError("the other end of a transfer is too late: no answer within the group's timeout") from error
        except OSError as error:
            self._failure = str(error)
            raise lost_peer(error) from error
        except BaseException:
            self._failure = "a transfer was interrupted"
            raise


class _Writer:
    """A thread that writes what does not fit into the kernel's buffer, in order."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._left: queue.Queue[bytes | None] = queue.Queue()  # None ends the thread
        self._error: OSError | None = None
        threading.Thread(target=self._run, name="autofunc_writer", daemon=True).start()

    def write(self, data: bytes) -> None:
        """Write this after all that was given before."""
        self._raise()
        self._left.put(data)

    def is_idle(self) -> bool:
        """Return whether all is written.

        Raises:
            OSError: if it could not be written.
        """
        is_idle = self._left.unfinished_tasks == 0  # looked at first: a failure ends a task too
        self._raise()
        return is_idle

    def finish(self) -> None:
        """Wait until all is written. Raises: see `is_idle`."""
        self._left.join()
        self._raise()

    def stop(self) -> None:
        """End the thread."""
        self._left.put(None)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (data := self._left.get()) is not None:
            try:
                if self._error is None:
                    self._peer.sendall(data)
            except OSError as error:
                self._error = error
            finally:
                self._left.task_done()
