"""Products are expensive on a CPU and cheap on a GPU, relative to reading memory."""

from __future__ import annotations

import pytest
import torch

from autofunc.engine import device_speed
from autofunc.engine.device_speed import multiplications_per_byte


def test_multiplications_per_byte_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    names = {"NVIDIA H100 80GB HBM3": 148, "NVIDIA A100-SXM4-80GB": 78, "something new": 78}
    for name, expected in names.items():
        monkeypatch.setattr(device_speed, "_name_of", lambda device, name=name: name)
        assert round(multiplications_per_byte(gpu, torch.bfloat16)) == expected
        assert multiplications_per_byte(cpu, torch.bfloat16) < expected
        assert multiplications_per_byte(gpu, torch.float32) < expected
