"""NCCL takes what a pipeline asks of it. One GPU is a world of one; with several, a pipeline runs over them."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import autofunc as af
from autofunc.runtime.pair_groups import nccl_group

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
