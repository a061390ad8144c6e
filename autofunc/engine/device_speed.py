"""How fast devices multiply, relative to reading memory: whether recomputing a value is cheap."""

from __future__ import annotations

from functools import cache

import torch

_CPU = 8.0
"""Multiplications per byte read, on the machines that ran the benchmarks; see `bench/engine_memory.py`."""

_GPUS = {  # dense 16-bit Tflop/s, 32-bit Tflop/s, TB/s, from the vendor's data sheets; the first match counts
    "H200": (989.5, 67.0, 4.8),
    "H100 PCIe": (756.0, 51.0, 2.0),
    "H100 NVL": (835.5, 60.0, 3.9),
    "H100": (989.5, 67.0, 3.35),
    "A100": (312.0, 19.5, 2.0),
    "L40S": (362.0, 91.6, 0.864),
    "V100": (125.0, 15.7, 0.9),
}
_OTHER_GPU = _GPUS["A100"]


def multiplications_per_byte(device: torch.device, dtype: torch.dtype) -> float:
    """Return how many multiplications of a matrix product take as long as reading or writing a byte.

    Args:
        device: where products run; unknown GPUs count as an A100.
        dtype: of the factors.
    """
    if device.type != "cuda":
        return _CPU
    half, single, terabytes = _speed_of(_name_of(device)) or _OTHER_GPU
    return (half if dtype.itemsize <= 2 else single) / 2 / terabytes


def peak_tflops(device: torch.device) -> float | None:
    """Return a device's peak Tflop/s for dense 16-bit products (a multiply-add is two operations); None if unknown."""
    speed = _speed_of(_name_of(device)) if device.type == "cuda" else None
    return None if speed is None else speed[0]


def _speed_of(name: str) -> tuple[float, float, float] | None:
    return next((speed for known, speed in _GPUS.items() if known in name), None)


@cache
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
