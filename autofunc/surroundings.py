"""Torch settings that operators read besides their arguments: a capture under some settings is not valid for others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

_DEVICES = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))
_BACKENDS: Any = torch.backends
_KERNELS: Any = torch.backends.cuda


class _Setting(NamedTuple):
    """A torch setting that chooses operators or their precision, and that a capture freezes."""

    name: str
    read: Callable[[], Hashable]
    is_of_run: bool = False  # whether all processes of a run must agree on it


def _autocast() -> Hashable:
    """Return the autocast dtype of each device that has it enabled."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _DEVICES if torch.is_autocast_enabled(kind))


_SETTINGS = (
    _Setting("the default dtype", torch.get_default_dtype, True),
    _Setting("the default device", torch.get_default_device),
    _Setting("float32 matmul precision", torch.get_float32_matmul_precision, True),
    _Setting("the use of deterministic algorithms", torch.are_deterministic_algorithms_enabled, True),
    _Setting("autocast", _autocast, True),
    _Setting("flash attention", _KERNELS.flash_sdp_enabled),
    _Setting("memory efficient attention", _KERNELS.mem_efficient_sdp_enabled),
    _Setting("attention by plain products", _KERNELS.math_sdp_enabled),
    _Setting("attention of cuDNN", _KERNELS.cudnn_sdp_enabled),
    _Setting("cuDNN", lambda: _BACKENDS.cudnn.enabled),
    _Setting("oneDNN", lambda: _BACKENDS.mkldnn.enabled),
    _Setting("the fast path of attention modules", _BACKENDS.mha.get_fastpath_enabled),
)
"""All such settings. Grad and inference mode are not among them: a pipeline sets these itself."""


def surroundings() -> Hashable:
    """Return the current settings. Every step asks; it takes a few microseconds."""
    return tuple(setting.read() for setting in _SETTINGS)


def named_settings() -> dict[str, str]:
    """Return the settings that all processes of a run must agree on, as text."""
    return {setting.name: repr(setting.read()) for setting in _SETTINGS if setting.is_of_run}
