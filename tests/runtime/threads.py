"""Ranks on threads, over a transport that blocks: real programs under rules as strict as NCCL's, or stricter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autofunc.runtime.program import Channel
from autofunc.runtime.transport import MemoryHub, MemoryTransport
from tests.runtime.rendezvous import Rules


class Deadlock(Exception):
    """All remaining ranks wait."""


class Hall:
    """Where the ranks of one run wait for each other.

    Args:
        num_ranks: how many there are.
    """

    def __init__(self, num_ranks: int) -> None:
        self.lock = threading.Condition()
        self.posted: set[tuple[Channel, int]] = set()  # which ranks have posted on a channel
        self._left, self._waiting, self._is_dead = num_ranks, 0, False

    def moved(self, finished: int = 0) -> None:
        """Wake all waiting ranks. Called with the lock held."""
        self._left, self._waiting = self._left - finished, 0
        self.lock.notify_all()

    def wait(self, is_there: Callable[[], bool]) -> None:
        """Block the rank until a condition holds. Called with the lock held."""
        while not is_there():
            self._waiting += 1
            if self._waiting == self._left:
                self._is_dead = True
                self.lock.notify_all()
            if not self._is_dead:
                self.lock.wait()
            if self._is_dead:
                raise Deadlock


class Ticket:
    """The ticket of a transfer: `arrived` blocks, as between processes."""

    def __init__(self, ticket: Any, hall: Hall) -> None:
        self._ticket, self._hall = ticket, hall

    @property
    def tensors(self) -> Any:
        """See `Ticket.tensors`."""
        return self._ticket.tensors

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return bool(self._ticket.done)

    def arrived(self) -> bool:
        """See `Ticket.arrived`."""
        with self._hall.lock:
            self._hall.wait(lambda: self.done)
        return True

    def settle(self) -> None:
        """See `Ticket.settle`."""
        self.arrived()


class BlockingPort:
    """A mailbox whose posts follow rules."""

    def __init__(self, box: Any, channel: Channel, rank: int, hall: Hall, rules: Rules) -> None:
        self._box, self._channel, self._rank, self._hall, self._rules = box, channel, rank, hall, rules

    def send(self, tensors: Any) -> Ticket:
        """See `Port.send`."""
        return self._post(lambda: self._box.send(tensors), self._rules.send_waits or self._rules.host_waits)

    def receive(self, into: Any) -> Ticket:
        """See `Port.receive`."""
        return self._post(lambda: self._box.receive(into), self._rules.host_waits)

    def _post(self, post: Callable[[], Any], waits: bool) -> Ticket:
        hall = self._hall
        with hall.lock:
            ticket = Ticket(post(), hall)
            hall.posted.add((self._channel, self._rank))
            hall.moved()
            if not self._rules.connected:
                hall.wait(lambda: all((self._channel, end) in hall.posted for end in self._channel))
            if waits:
                hall.wait(lambda: ticket.done)
        return ticket


class BlockingTransport(MemoryTransport):
    """One rank's end of a hub whose messages follow rules."""

    def __init__(self, hub: MemoryHub, rank: int, hall: Hall, rules: Rules) -> None:
        super().__init__(hub, rank)
        self._own, self._hall, self._rules = rank, hall, rules

    def open(self, channel: Channel) -> Any:
        """See `Transport.open`."""
        return BlockingPort(super().open(channel), channel, self._own, self._hall, self._rules)


def run_on_threads(ranks: Sequence[Iterator[None]], hall: Hall) -> None:
    """Run each rank on a thread of its own.

    Raises:
        Deadlock: when all that are left wait for each other.
        BaseException: what a rank raised else.
    """
    errors: list[BaseException] = []

    def run(rank: Iterator[None]) -> None:
        try:
            for _ in rank:
                raise AssertionError("a transport that blocks never yields")
        except BaseException as error:
            errors.append(error)
        with hall.lock:
            hall.moved(finished=1)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    for error in errors:
        causes = (error, error.__cause__)
        if not any(isinstance(cause, Deadlock) for cause in causes):
            raise error
    if errors:
        raise Deadlock
