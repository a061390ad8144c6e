"""NCCL takes what a pipeline asks of it. One GPU is a world of one; with several, a pipeline runs over them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import autofunc as af
from autofunc.mesh import timeout_of
from autofunc.runtime.pair_groups import nccl_group
from autofunc.train.flight_recorder import FlightRecorder
from tests.cases import assert_same_tree, make_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "transfers", [af.Transfers(), af.Transfers(max_ctas=2, high_priority=True)], ids=["default", "few"]
)
def test_a_message_to_oneself(transfers: af.Transfers) -> None:
    """Connected before it is used, and several tensors are one call, whose work says when they are there."""
    device = torch.device("cuda", 0)
    group = nccl_group(dist.HashStore(), 0, 1, timedelta(seconds=60), transfers, device)
    sent = [torch.arange(6.0, device=device), torch.ones(3, 2, device=device)]
    received = [torch.empty_like(tensor) for tensor in sent]
    group._start_coalescing()
    for given, into in zip(sent, received, strict=True):
        group.send([given], 0, 0)
        group.recv([into], 0, 0)
    group._end_coalescing().wait()
    for given, into in zip(sent, received, strict=True):
        torch.testing.assert_close(into, given, rtol=0, atol=0)
    group.shutdown()


def test_its_flight_recorder_is_kept(tmp_path: Path) -> None:
    """In a process of its own: the recorder is on or off from the first communicator on."""
    program = (
        "import torch, torch.distributed as dist\n"
        "from autofunc.train.flight_recorder import keep_record\n"
        "dist.init_process_group('nccl', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(3, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
        "keep_record()\n"
        "dist.destroy_process_group()\n"
    )
    variables = FlightRecorder(tmp_path).variables()
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **variables}, check=True, timeout=120)
    (entry,) = pickle.loads((tmp_path / "logs" / "nccl_trace_rank_0").read_bytes())["entries"]
    assert entry["profiling_name"] == "nccl:all_reduce"


def test_a_world_of_one() -> None:
    """A pipeline over a mesh, as a run makes it: objects travel by gloo, tensors by NCCL."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77)
    )
    torch.cuda.set_device(0)
    try:
        mesh = af.make_mesh(device_type="cuda")
        model, stages, loss, batch = make_case("gpt2", 1, rows=4)
        batch = {name: leaf.cuda() for name, leaf in batch.items()}
        s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=4)
        pipe = af.pipeline(stages, s, loss=loss, mesh=mesh, transfers=af.Transfers(max_ctas=2))
        params = pipe.init(0)
        found, grads = af.value_and_grad(pipe)(params, batch, (0, 1))
        alone = af.pipeline(stages, s, loss=loss)
        expected, expected_grads = af.value_and_grad(alone)(model.init(0, device="cuda"), batch, (0, 1))
        assert torch.equal(found, expected)
        assert_same_tree(expected_grads, pipe.gather(grads))
        assert pipe.profile(params, batch).makespan > 0
        assert timeout_of(mesh.get_group("pp"), torch.device("cuda")) == timedelta(seconds=77)
        pipe.close()
    finally:
        dist.destroy_process_group()
