"""Batches on their way to a GPU, on a stream of their own, while it computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from autofunc.data import START, Part
from autofunc.train.batches import Batches

pytestmark = pytest.mark.gpu


def test_they_arrive_whole_and_before_they_are_used() -> None:
    device, rows = torch.device("cuda", 0), 1 << 20

    def numbered() -> Iterator[list[Part]]:
        for number in range(8):
            yield [Part({"x": torch.full((rows,), number)}, rows, ends_batch=True, after=START)]

    batches, busy, sums = Batches(numbered(), device), torch.randn(2048, 2048, device=device), []
    for batch in batches:
        (x,) = (sent["x"] for sent in batch.sent)
        assert x.device == device and batch.parts[0].batch["x"].is_pinned()
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        sums.append(x.sum())
        del batch, x  # its memory may be the next one's, once the sum has been made
        batches.read_ahead()
    assert torch.stack(sums).tolist() == [number * rows for number in range(8)]
