"""Tokens in place of tensors: a value is its name, memory is counted, and a slot knows who may still read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autofunc.runtime.program import Layout
from autofunc.schedule import Kind, Schedule
from autofunc.splitting import Value

Name = tuple[str, int, int, int]
"""(what, stage that made it or is to get it, number among the values of that boundary, microbatch)."""


def expect(found: object, expected: object, what: str) -> None:
    """Two things are equal; says both when they are not."""
    assert found == expected, f"{what}: expected {expected}, found {found}"


@dataclass
class Ledger:
    """What one rank did and holds."""

    schedule: Schedule  # lowered
    rank: int
    alive: int = 0  # bytes
    ops_done: int = 0
    alive_after: list[int] = field(default_factory=list)  # each op
    computed: list[tuple[Kind, int, int]] = field(default_factory=list)
    sends: list[SendRecord] = field(default_factory=list)
    settled: dict[int, list[int]] = field(default_factory=dict)  # position of an op -> positions of the sends it settles
    leased: Counter[Layout] = field(default_factory=Counter)  # slots in use
    most_leased: Counter[Layout] = field(default_factory=Counter)  # at once

    def before(self, *_: object) -> None:
        """See `Observer.before`."""

    def after(self, *_: object) -> None:
        """See `Observer.after`."""
        self.alive_after.append(self.alive)
        self.ops_done += 1


class Held:
    """Something that takes memory on a rank as long as anybody holds it."""

    __slots__ = ("__weakref__", "ledger", "num_bytes")

    def __init__(self, ledger: Ledger, num_bytes: int) -> None:
        self.ledger, self.num_bytes = ledger, num_bytes
        ledger.alive += num_bytes

    def __del__(self) -> None:
        self.ledger.alive -= self.num_bytes


class Token(Held):
    """A value that a stage made, in memory of its own."""

    __slots__ = ("layout", "name")

    def __init__(self, ledger: Ledger, value: Value, name: Name) -> None:
        super().__init__(ledger, value.num_bytes)
        self.layout, self.name = (value.shape, value.dtype), name


@dataclass
class Slot:
    """Memory that receives write into."""

    layout: Layout
    leases: int = 0


class Lease(Held):
    """A value that was received: it lies in a slot until the slot is given to another receive."""

    __slots__ = ("_name", "_number", "_slot")

    def __init__(self, ledger: Ledger, slot: Slot) -> None:
        (shape, dtype), slot.leases = slot.layout, slot.leases + 1
        super().__init__(ledger, torch.Size(shape).numel() * dtype.itemsize)
        self._slot, self._number = slot, slot.leases
        self._name: Name | None = None
        ledger.leased[slot.layout] += 1
        ledger.most_leased[slot.layout] = max(ledger.most_leased[slot.layout], ledger.leased[slot.layout])

    def __del__(self) -> None:
        super().__del__()
        self.ledger.leased[self._slot.layout] -= 1

    def copy_(self, source: Token) -> None:
        """What the transport does to deliver."""
        expect(source.layout, self._slot.layout, "layout of what is received")
        self._check()
        self._name = source.name

    @property
    def name(self) -> Name:
        """Of the value, which has arrived and is still there."""
        self._check()
        assert self._name is not None, "a receive is read before it has arrived"
        return self._name

    def _check(self) -> None:
        assert self._number == self._slot.leases, f"the slot of {self._name} is used after it was given away"


class Residuals(Held):
    """What F keeps for B or I, or I for W."""

    __slots__ = ("kept", "microbatch", "names", "what")

    def __init__(self, ledger: Ledger, num_bytes: int, what: tuple[str, int], microbatch: int, kept: list[Any]) -> None:
        super().__init__(ledger, num_bytes)
        self.what, self.microbatch, self.kept = what, microbatch, kept
        self.names = [value.name for value in kept]

    def open(self, what: tuple[str, int]) -> int:
        """The microbatch, if these are the residuals that were asked for and what they hold is still there."""
        expect(self.what, what, "residuals")
        expect([value.name for value in self.kept], self.names, f"what residuals {what} hold")
        return self.microbatch


class Sums:
    """Two sums of gradients of one stage: one that comes with the input's gradient, and one of the weights."""

    def __init__(self, ledger: Ledger, num_bytes: int) -> None:
        self._ledger, self._num_bytes = ledger, num_bytes
        self.terms: tuple[list[int], list[int]] = ([], [])  # microbatches in the order in which they were added

    def add(self, grads: Sequence[int | None]) -> None:
        """Add a microbatch's gradients; None is a zero."""
        if not any(self.terms):
            self._ledger.alive += self._num_bytes
        for terms, grad in zip(self.terms, grads, strict=True):
            terms += [] if grad is None else [grad]

    def take(self) -> list[list[int]]:
        """All that was added up."""
        return list(self.terms)


@dataclass
class SendRecord:
    """What became of a send. It holds nothing of what was sent."""

    position: int  # of the op
    is_settled: bool = False


class Sent:
    """A ticket of a send: may be settled once, and as long as the rank has work left, when it is known to be done."""

    def __init__(self, ticket: Any, ledger: Ledger) -> None:
        self._ledger, self._ticket = ledger, ticket
        self._record = SendRecord(ledger.ops_done)
        ledger.sends.append(self._record)

    @property
    def tensors(self) -> Any:
        """See `Ticket.tensors`."""
        return self._ticket.tensors

    def settle(self) -> None:
        """See `Ticket.settle`."""
        ledger, record = self._ledger, self._record
        assert not record.is_settled, f"the send at {record.position} is settled twice"
        record.is_settled = True
        if ledger.ops_done < len(ledger.schedule[ledger.rank]):
            assert self._ticket.arrived(), f"the send at {record.position} is settled before it is done"
            ledger.settled.setdefault(ledger.ops_done, []).append(record.position)


class TokenPort:
    """A port of the transport whose slots are leased, and whose sends are watched."""

    def __init__(self, port: Any, ledger: Ledger) -> None:
        self._port, self._ledger = port, ledger

    def send(self, tokens: list[Token]) -> Sent:
        """See `Port.send`."""
        return Sent(self._port.send(tokens), self._ledger)

    def receive(self, into: list[Slot]) -> Any:
        """See `Port.receive`."""
        return self._port.receive([Lease(self._ledger, slot) for slot in into])
