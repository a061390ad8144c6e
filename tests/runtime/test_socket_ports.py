"""Small messages between ranks of one machine: order, full buffers, and ends that are gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import autofunc as af
from autofunc.errors import PeerLostError
from autofunc.mesh import pp_ranks
from autofunc.runtime import transport
from autofunc.runtime.pair_groups import connect, disconnect
from autofunc.runtime.program import Channel
from autofunc.runtime.socket_ports import SMALL, SocketLine, connect_socket
from autofunc.runtime.transport import DistributedTransport
from autofunc.tree import flatten
from autofunc.unix_sockets import prepare
from tests.cases import make_case, pp_mesh
from tests.pool import WorkerPool

Lines = tuple[SocketLine, SocketLine]


@contextmanager
def joined(seconds: float = 20) -> Iterator[Lines]:
    ends = socket.socketpair()
    for end in ends:
        prepare(end, timedelta(seconds=seconds))
    both = SocketLine(ends[0]), SocketLine(ends[1])
    try:
        yield both
    finally:
        for line in both:
            line.close()


@pytest.fixture
def lines() -> Iterator[Lines]:
    with joined() as both:
        yield both


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.complex64)


def message(sizes: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 100, (size,), generator=generator).to(DTYPES[(seed + size) % len(DTYPES)]) for size in sizes]


@given(st.lists(st.lists(st.sampled_from([0, 1, 7, 5_000, 200_000]), min_size=1, max_size=3), max_size=8), st.data())
def test_messages_arrive_in_order_whenever_they_are_read(messages: list[list[int]], data: st.DataObject) -> None:
    """All are sent first, and may exceed the kernel's buffer; receives may be posted long before they are waited for."""
    with joined() as (source, target):
        sent = [message(sizes, seed) for seed, sizes in enumerate(messages)]
        into = [[torch.zeros_like(tensor) for tensor in tensors] for tensors in sent]
        early = data.draw(st.integers(0, len(messages)))
        tickets = [target.receive(tensors) for tensors in into[:early]]
        for tensors in sent:
            reused = [tensor.clone() for tensor in tensors]
            source.send(reused).settle()
            for tensor in reused:
                tensor.zero_()
        tickets += [target.receive(tensors) for tensors in into[early:]]
        for number in data.draw(st.permutations(range(len(tickets)))):
            assert tickets[number].arrived()
            assert all(map(torch.equal, into[number], sent[number]))
        source.flush()


def test_any_layout(lines: Lines) -> None:
    """A transposed tensor, one with a conjugate bit, and one with a negative bit, are sent by their values."""
    source, target = lines
    z = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    sent = [z.real.t(), z.conj(), z.conj().imag]
    into = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in sent]
    source.send(sent)
    target.receive(into).arrived()
    assert all(map(torch.equal, into, sent))


def test_sends_do_not_wait_for_the_other_end(lines: Lines) -> None:
    """More than any buffer holds; `flush` waits until the other end has read enough."""
    source, target = lines
    sent = [torch.full((1 << 20,), float(number)) for number in range(8)]  # 32 MB
    for tensor in sent:
        source.send([tensor]).settle()
    flushing = threading.Thread(target=source.flush)
    flushing.start()
    flushing.join(0.05)
    assert flushing.is_alive(), "the buffer holds 32 MB"
    for tensor in sent:
        into = torch.empty_like(tensor)
        target.receive([into]).arrived()
        assert torch.equal(into, tensor)
    flushing.join(20)
    assert not flushing.is_alive()


def test_a_flushed_message_outlives_its_sender(lines: Lines) -> None:
    source, target = lines
    source.send([torch.tensor([7.0])])
    source.flush()
    source.close()
    into = torch.zeros(1)
    target.receive([into]).arrived()
    assert into.item() == 7


def test_an_end_that_is_gone(lines: Lines) -> None:
    source, target = lines
    ticket = target.receive([torch.zeros(1)])
    source.close()
    with pytest.raises(PeerLostError, match="the other end of a transfer is gone or too late: connection closed"):
        ticket.arrived()
    with pytest.raises(PeerLostError, match="Broken pipe"):
        target.send([torch.zeros(1)])


def test_an_end_that_is_gone_while_a_thread_writes(lines: Lines) -> None:
    source, target = lines
    source.send([torch.zeros(8 << 20)])
    target.close()
    with pytest.raises(PeerLostError, match=r"Broken pipe|reset by peer"):
        source.flush()
    with pytest.raises(PeerLostError):
        source.send([torch.zeros(1)])


def test_an_end_that_is_too_late() -> None:
    with joined(seconds=0.05) as (source, target):
        with pytest.raises(PeerLostError, match="gone or too late"):
            target.receive([torch.zeros(1)]).arrived()
        source.send([torch.zeros(8 << 20)])
        with pytest.raises(PeerLostError, match="gone or too late"):
            source.flush()


def test_the_thread_ends_with_its_connection() -> None:
    before = threading.enumerate()
    with joined() as (source, target):
        source.send([torch.zeros(8 << 20)])
        (writer,) = (thread for thread in threading.enumerate() if thread not in before)
        target.receive([torch.zeros(8 << 20)]).arrived()
    writer.join(20)
    assert not writer.is_alive()


@pytest.mark.parametrize("path", ["", "/nowhere/s"])  # no Unix sockets; and another machine, whose files differ
def test_ends_that_cannot_reach_each_other_both_know(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    found: list[SocketLine | None] = []
    listens = threading.Thread(target=lambda: found.append(connect_socket(store, 0, timedelta(seconds=20))))
    elsewhere = dist.PrefixStore("elsewhere", dist.HashStore())
    elsewhere.set("path", path)
    listens.start()
    answers: dict[str, str] = {}
    monkeypatch.setattr(dist.PrefixStore, "set", lambda self, key, value: answers.update({key: value}))
    assert connect_socket(elsewhere, 1, timedelta(seconds=20)) is None
    store.set("answer", answers["answer"])
    listens.join(20)
    assert found == [None]


def ways_of(sockets: bool) -> tuple[list[float], int, bool]:
    """Gradients of a step whose messages are small, how many gloo carried, and whether the two ends have a socket."""
    model, _, loss, batch = make_case("gpt2", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=4)
    options = af.Transfers(sockets=sockets)
    pipe = af.pipeline(af.split(model, 2), s, loss=loss, mesh=pp_mesh(2), transfers=options)
    by_gloo = []
    post = transport._GroupPort.send
    transport._GroupPort.send = lambda self, tensors: by_gloo.append(1) or post(self, tensors)  # type: ignore[method-assign, assignment, func-returns-value]
    try:
        _, grads = af.value_and_grad(pipe)(pipe.init(0), batch)
    finally:
        transport._GroupPort.send = post  # type: ignore[method-assign]
    group, user = pp_mesh(2).get_group(), object()
    pairs = connect(group, [(0, 1)], torch.device("cpu"), options, user)
    has_socket = any(ends.line is not None for ends in pairs.values())
    disconnect(group, user)
    pipe.close()
    return [leaf.double().sum().item() for leaf in flatten(grads).values()], len(by_gloo), has_socket


def test_sockets_change_the_way_and_no_bits(workers: WorkerPool) -> None:
    over_sockets, over_gloo = workers.run(ways_of, True), workers.run(ways_of, False)
    for (with_sockets, carried, has), (without, carried_all, has_not) in zip(over_sockets, over_gloo, strict=True):
        assert with_sockets == without
        assert (carried, has, has_not) == (0, True, False)
        assert carried_all == 5  # four microbatches, and the tied weight's gradient


def large_and_small() -> list[float]:
    """What the second rank receives of messages on both sides of the limit, in turn."""
    mesh = pp_mesh(2)
    moved = DistributedTransport(
        mesh.get_group(), pp_ranks(mesh), torch.device("cpu"), [Channel(0, 1)], af.Transfers()
    )  # fmt: skip
    own = mesh.get_local_rank()
    port = moved.open(Channel(0, 1))
    sizes = [1, SMALL, 2, SMALL // 4 + 1, 3, SMALL // 4]
    tensors = [torch.full((size,), float(number + 1) * (1 - own)) for number, size in enumerate(sizes)]
    tickets = [(port.receive if own else port.send)([tensor]) for tensor in tensors]
    for ticket in reversed(tickets):
        ticket.arrived()
    moved.flush()
    moved.close()
    return [tensor.mean().item() for tensor in tensors]


def test_messages_on_both_sides_of_the_limit(workers: WorkerPool) -> None:
    assert workers.run(large_and_small)[1] == [1, 2, 3, 4, 5, 6]
