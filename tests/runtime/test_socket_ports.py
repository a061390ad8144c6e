"""Small messages between ranks of one machine: order, full buffers, and ends that are gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import autofunc as af
from autofunc.errors import PeerLostError
from autofunc.mesh import pp_ranks
from autofunc.runtime import socket_ports, transport
from autofunc.runtime.program import Channel
from autofunc.runtime.socket_ports import SocketLine, lines
from autofunc.runtime.transport import DistributedTransport
from autofunc.shard import unix_sockets
from autofunc.shard.links import links
from autofunc.tree import flatten
from tests.cases import cut_evenly, make_case, pp_mesh
from tests.pool import WorkerPool

Ends = tuple[SocketLine, SocketLine]


@contextmanager
def joined(seconds: float = 20) -> Iterator[Ends]:
    pair = socket.socketpair()
    for end in pair:
        unix_sockets._prepare(end, timedelta(seconds=seconds))
    both = SocketLine(pair[0]), SocketLine(pair[1])
    try:
        yield both
    finally:
        for line in both:
            line.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
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


def test_any_layout(ends: Ends) -> None:
    """A transposed tensor, one with a conjugate bit, and one with a negative bit, are sent by their values."""
    source, target = ends
    z = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    sent = [z.real.t(), z.conj(), z.conj().imag]
    into = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in sent]
    source.send(sent)
    target.receive(into).arrived()
    assert all(map(torch.equal, into, sent))


def test_sends_do_not_wait_for_the_other_end(ends: Ends) -> None:
    """More than any buffer holds; `flush` waits until the other end has read enough."""
    source, target = ends
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


def test_a_flushed_message_outlives_its_sender(ends: Ends) -> None:
    source, target = ends
    sent, into = torch.arange(2 << 20), torch.zeros(2 << 20, dtype=torch.int64)  # 16 MB: more than a buffer holds
    source.send([sent])
    reads = threading.Thread(target=lambda: target.receive([into]).arrived())
    reads.start()
    source.flush()
    source.close()
    reads.join(20)
    assert torch.equal(into, sent)


def test_a_step_flushes_what_it_sent(workers: WorkerPool) -> None:
    """Otherwise a process that ends after its step would take the writer's bytes with it."""
    assert workers.run(flushes) == [2] * 4  # one line to each of the other ranks of `pp_mesh(2)`, in two steps


def flushes() -> int:
    _, stages, loss, batch = make_case("mlp", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(stages, s, loss=loss, mesh=pp_mesh(2))
    params, flushed, flush = pipe.init(0), [], SocketLine.flush
    SocketLine.flush = lambda line: flushed.append(line) or flush(line)  # type: ignore[method-assign, func-returns-value]
    try:
        af.value_and_grad(pipe)(params, batch)
        pipe(params, batch)
    finally:
        SocketLine.flush = flush  # type: ignore[method-assign]
    pipe.close()
    return len(flushed)


def test_a_line_that_failed_stays_failed() -> None:
    """What arrives late belongs to an earlier message, and would be read as a later one's."""
    with joined(seconds=0.05) as (source, target):
        with pytest.raises(PeerLostError, match="too late"):
            target.receive([torch.zeros(2)]).arrived()
        source.send([torch.ones(2)])
        late = target.receive([torch.zeros(2)])
        for use in (late.arrived, lambda: target.send([torch.zeros(1)])):
            with pytest.raises(PeerLostError, match="cannot be used any more: the other end was too late"):
                use()


def test_a_step_that_failed_before_it_read_all(ends: Ends) -> None:
    source, target = ends
    source.send([torch.ones(1)])
    target.receive([torch.zeros(1)]).arrived()
    target.abandon()  # nothing is left: the next step may use it
    source.send([torch.ones(1)])
    ticket = target.receive([torch.zeros(1)])
    target.abandon()
    with pytest.raises(PeerLostError, match="an earlier step failed before it had read all"):
        ticket.arrived()


def test_an_end_that_is_gone(ends: Ends) -> None:
    source, target = ends
    ticket = target.receive([torch.zeros(1)])
    source.close()
    with pytest.raises(PeerLostError, match="the other end of a transfer is gone or too late: connection closed"):
        ticket.arrived()


def test_sending_to_an_end_that_is_gone(ends: Ends) -> None:
    source, target = ends
    target.close()
    with pytest.raises(PeerLostError, match="Broken pipe"):
        source.send([torch.zeros(1)])


def test_an_end_that_is_gone_while_a_thread_writes(ends: Ends) -> None:
    source, target = ends
    source.send([torch.zeros(8 << 20)])
    target.close()
    with pytest.raises(PeerLostError, match=r"Broken pipe|reset by peer"):
        source.flush()
    with pytest.raises(PeerLostError):
        source.send([torch.zeros(1)])


def test_an_end_that_is_too_late() -> None:
    with joined(seconds=0.05) as (source, target):
        with pytest.raises(PeerLostError, match="too late: no answer"):
            target.receive([torch.zeros(1)]).arrived()
        source.send([torch.zeros(8 << 20)])
        with pytest.raises(PeerLostError, match="too late: no answer"):
            source.flush()


def test_the_thread_ends_with_its_connection() -> None:
    before = threading.enumerate()
    with joined() as (source, target):
        source.send([torch.zeros(8 << 20)])
        (writer,) = (thread for thread in threading.enumerate() if thread not in before)
        target.receive([torch.zeros(8 << 20)]).arrived()
    writer.join(20)
    assert not writer.is_alive()


def reached(machines: list[int]) -> tuple[list[int], bool, bool, float, int]:
    """Ranks on machines: which of them a rank reaches, whether all agree, and a step on all of them.

    Returns:
        Ranks reached; whether all are; whether the sockets of tp and cp ranks exist; the step's loss; messages by gloo.
    """
    own, find = dist.get_rank(), unix_sockets._connected
    number = iter(range(own))
    here = [rank for rank in range(own) if machines[rank] == machines[own]]
    unix_sockets._connected = lambda path, timeout: find(path, timeout) if next(number) in here else None
    try:
        group = dist.new_group(backend="gloo")
        found = lines(group)
        number = iter(range(own))
        has_links = links(group) is not None
    finally:
        unix_sockets._connected = find
    model, _, loss, batch = make_case("mlp", 4, 8)
    s = af.schedule.build("1f1b", num_ranks=4, num_microbatches=8)
    pipe = af.pipeline(cut_evenly(model, 4), s, loss=loss, mesh=DeviceMesh.from_group(group, "cpu", mesh_dim_names=("pp",)))
    with counted_gloo() as by_gloo:
        value, _ = af.value_and_grad(pipe)(pipe.init(0), batch)
    pipe.close()
    dist.destroy_process_group(group)
    return [*found.by_rank], found.reach_all, has_links, value.item(), len(by_gloo)


def test_ranks_of_several_machines(workers: WorkerPool) -> None:
    """Each pair on one machine has a socket; the others and broadcasts use gloo, and the numbers stay the same."""
    alone = workers.run(reached, [0, 0, 0, 0])
    assert [each[:3] for each in alone] == [([other for other in range(4) if other != own], True, True) for own in range(4)]
    assert [each[4] for each in alone] == [0, 0, 0, 0]
    apart = workers.run(reached, [0, 0, 1, 1])
    assert [each[:3] for each in apart] == [
        ([1], False, False),
        ([0], False, False),
        ([3], False, False),
        ([2], False, False),
    ]
    assert [each[4] for each in apart] == [0, 8, 8, 0], "the second and third exchange eight microbatches each way"
    assert len({each[3] for each in [*alone, *apart]}) == 1


@contextmanager
def counted_gloo() -> Iterator[list[int]]:
    """Count the messages that this rank sends over gloo."""
    sent: list[int] = []
    post = transport._GroupPort.send

    def counted(port: Any, tensors: list[Tensor]) -> Any:
        sent.append(len(tensors))
        return post(port, tensors)

    transport._GroupPort.send = counted  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        transport._GroupPort.send = post  # type: ignore[method-assign]


def ways_of(sockets: bool) -> tuple[list[bytes], int]:
    """Gradients of a step whose messages are small, and how many gloo carried."""
    model, _, loss, batch = make_case("gpt2", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=4)
    options = af.Transfers(sockets=sockets)
    pipe = af.pipeline(af.split(model, 2), s, loss=loss, mesh=pp_mesh(2), transfers=options)
    with counted_gloo() as by_gloo:
        _, grads = af.value_and_grad(pipe)(pipe.init(0), batch)
    pipe.close()
    return [leaf.numpy().tobytes() for leaf in flatten(grads).values()], len(by_gloo)


def test_sockets_change_the_way_and_no_bits(workers: WorkerPool) -> None:
    over_sockets, over_gloo = workers.run(ways_of, True), workers.run(ways_of, False)
    for (with_sockets, carried), (without, carried_all) in zip(over_sockets, over_gloo, strict=True):
        assert with_sockets == without
        assert carried == 0
        assert carried_all == 5  # four microbatches, and the tied weight's gradient


def large_and_small() -> list[float]:
    """What the second rank receives of messages on both sides of the limit, in turn."""
    mesh = pp_mesh(2)
    moved = DistributedTransport(
        mesh.get_group(), pp_ranks(mesh), torch.device("cpu"), [Channel(0, 1)], af.Transfers()
    )  # fmt: skip
    own = mesh.get_local_rank()
    port, limit = moved.open(Channel(0, 1)), socket_ports._SMALL // 4
    sizes = [1, 4 * limit, 2, limit + 1, 3, limit]
    tensors = [torch.full((size,), float(number + 1) * (1 - own)) for number, size in enumerate(sizes)]
    tickets = [(port.receive if own else port.send)([tensor]) for tensor in tensors]
    for ticket in reversed(tickets):
        ticket.arrived()
    moved.flush()
    moved.close()
    return [tensor.mean().item() for tensor in tensors]


def test_messages_on_both_sides_of_the_limit(workers: WorkerPool) -> None:
    assert workers.run(large_and_small)[1] == [1, 2, 3, 4, 5, 6]
