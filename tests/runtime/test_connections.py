"""Ranks are connected before the first step, at most twice to a neighbour, and `close` ends it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import AutofuncError
from autofunc.mesh import pp_ranks
from autofunc.runtime import pair_groups
from autofunc.runtime.ops import Receive, Send
from autofunc.runtime.program import Channel, channels_between
from autofunc.runtime.transport import DistributedTransport, _CoalescingPort
from tests.cases import make_case, plan_of, pp_mesh
from tests.pool import WorkerPool


@pytest.mark.parametrize(
    ("name", "stages_per_rank"), [("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4), ("zbv", 2)]
)
def test_two_channels_for_each_neighbour(name: str, stages_per_rank: int) -> None:
    s = af.schedule.build(name, num_ranks=4, num_microbatches=8, stages_per_rank=stages_per_rank)
    pairs = [
        pair
        for edge in af.schedule.chain(s.num_stages)
        for pair in ((edge.producer, edge.consumer), (edge.consumer, edge.producer))
    ]
    channels = channels_between(s, [(a, b) for a, b in pairs if s.placement[a] != s.placement[b]])
    for rank in range(4):
        neighbours = {end for channel in channels if rank in channel for end in channel} - {rank}
        assert sum(rank in channel for channel in channels) == 2 * len(neighbours) <= 4


def connected(close: bool) -> list[int]:
    """Count connections after a step, after one with another schedule and shape, and at the end."""
    counts = []
    pipes = []
    for name, rows in (("1f1b", 4), ("interleaved_1f1b", 8)):
        model, _, loss, batch = make_case("gpt2", 2, rows)
        s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
        pipe = af.pipeline(af.split(model, s.num_stages), s, loss=loss, mesh=pp_mesh(2))
        params = pipe.init(0)
        af.value_and_grad(pipe)(params, batch)
        pipe(params, batch)
        pipes.append(pipe)
        counts.append(len(pair_groups._known[pp_mesh(2).get_group()].groups))
    for pipe in pipes if close else []:
        pipe.close()
        counts.append(len(pair_groups._known[pp_mesh(2).get_group()].groups))
    loss_after, _ = af.value_and_grad(pipes[0])(pipes[0].init(0), make_case("gpt2", 2, 4)[3])
    assert loss_after.isfinite(), "a pipeline that was closed is built anew"
    pipes[0].close()
    pipes[1].close()
    return counts


def test_pipelines_share_connections_until_the_last_is_closed(workers: WorkerPool) -> None:
    assert workers.run(connected, True) == [[2, 2, 2, 0]] * 4


def reconnected() -> list[int]:
    """What the second of two ranks receives when the first alone has collected a transport that nobody closed."""
    mesh = pp_mesh(4)

    def transport() -> DistributedTransport:
        return DistributedTransport(
            mesh.get_group(), pp_ranks(mesh), torch.device("cpu"), [Channel(0, 1)], af.Transfers()
        )  # fmt: skip

    gc.disable()
    try:
        cycle: list[Any] = [transport()]
        cycle.append(cycle)
        del cycle
        if mesh.get_local_rank() == 0:
            gc.collect()
        transport().close()
        again = transport()  # the first rank must not connect anew, unless the second does
        number = torch.tensor([7 - 7 * mesh.get_local_rank()])
        if mesh.get_local_rank() < 2:
            port = again.open(Channel(0, 1))
            (port.receive if mesh.get_local_rank() else port.send)([number]).arrived()
        again.close()
        found: list[int] = number.tolist()
        return found
    finally:
        gc.enable()


def test_garbage_that_only_one_end_has_collected(workers: WorkerPool) -> None:
    assert workers.run(reconnected)[1] == [7]


class Backend:
    """Stands in for an NCCL communicator, and records its calls."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def send(self, tensors: list[Any], rank: int, tag: int) -> str:
        self.called.append(f"send {len(tensors)} to {rank}")
        return "work"

    def recv(self, tensors: list[Any], rank: int, tag: int) -> str:
        self.called.append(f"receive {len(tensors)} from {rank}")
        return "work"

    def _start_coalescing(self) -> None:
        self.called.append("begin")

    def _end_coalescing(self) -> str:
        self.called.append("end")
        return "all"


@pytest.mark.parametrize("name", af.schedule.names())
def test_a_rank_sends_another_one_message_between_two_computations(name: str) -> None:
    """So that what a computation makes for another rank, be it several values, is one call."""
    lowered = af.schedule.lower(af.schedule.build(name, num_ranks=4, num_microbatches=8))
    for row in lowered:
        sent: list[int] = []
        for action in row:
            if action.kind.is_compute:
                sent = []
            elif action.kind.is_send:
                sent.append(lowered.placement[action.peer])
                assert len(sent) == len(set(sent)), action


def test_values_of_one_edge_are_one_nccl_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model that passes on two values: what rank 0 posts to rank 1, and gets back, for one microbatch."""
    layers = {
        "a": af.Layer(
            lambda key: {"w": key.ones("w", (3,))}, lambda p, x, batch: (batch["x"] * p["w"], batch["x"] + p["w"])
        ),
        "b": af.Layer(lambda key: {"w": key.ones("w", (3,))}, lambda p, x, batch: (x[0] + x[1]) * p["w"]),
    }
    stages, s = af.split(af.Model(layers), ["b"]), af.schedule.build("1f1b", num_ranks=2, num_microbatches=1)
    pipe = af.pipeline(stages, s, loss=lambda outputs, microbatch: outputs.sum())
    program = plan_of(pipe, pipe.init(), {"x": torch.ones(1, 3)}).programs[0]
    backends = {channel: Backend() for channel in program.channels}
    monkeypatch.setattr("autofunc.runtime.transport.connect", lambda *_: backends)
    transport = DistributedTransport(None, [0, 1], torch.device("cuda"), program.channels, af.Transfers())  # type: ignore[arg-type]
    ports = [transport.open(channel) for channel in program.channels]
    for op in program.ops:
        if isinstance(op, Send):
            ports[op.channel].send([torch.ones(1, 3)] * 2)
        elif isinstance(op, Receive):
            assert len(op.slots) == 2
            ports[op.channel].receive([torch.ones(1, 3)] * 2)
    assert backends[Channel(0, 1)].called == ["begin", "send 1 to 1", "send 1 to 1", "end"]
    assert backends[Channel(1, 0)].called == ["begin", "receive 1 from 0", "receive 1 from 0", "end"]


def test_a_message_of_several_tensors_is_one_call() -> None:
    backend = Backend()
    port = _CoalescingPort(backend)
    assert port.send([torch.ones(2), torch.ones(3)]).works == ["all"]
    assert port.receive([torch.ones(2), torch.ones(3)]).works == ["all"]
    assert port.send([torch.ones(2)]).works == ["work"]
    assert backend.called == [
        "begin", "send 1 to 1", "send 1 to 1", "end", "begin", "receive 1 from 0", "receive 1 from 0", "end", "send 1 to 1",
    ]  # fmt: skip


def test_invalid_options_are_refused() -> None:
    with pytest.raises(AutofuncError, match="max_ctas=0, expected 1 or more"):
        af.Transfers(max_ctas=0)
