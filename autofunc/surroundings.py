"""What operators look at beside their arguments: what is captured under some settings of torch is not for others."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

_DEVICES = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def surroundings() -> Hashable:
    """Settings of torch that decide which operators run, or in what precision, and that a capture makes permanent.

    Autocast by device and its dtype, default dtype and device, deterministic algorithms, precision of products, and which
    kernels composite operators may choose. Grad and inference mode are not among them: a pipeline decides these itself.
    It is asked at every step, and takes some microseconds.
    """
    backends: Any = torch.backends
    kernels: Any = backends.cuda
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _DEVICES),
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.math_sdp_enabled(),
        kernels.cudnn_sdp_enabled(),
        backends.cudnn.enabled,
        backends.mkldnn.enabled,
        backends.mha.get_fastpath_enabled(),
    )


def named_settings() -> dict[str, str]:
    """Those of them that all processes of a run must share, as text."""
    autocast = {kind: torch.get_autocast_dtype(kind) for kind in _DEVICES if torch.is_autocast_enabled(kind)}
    return {
        "the default dtype": repr(torch.get_default_dtype()),
        "float32 matmul precision": repr(torch.get_float32_matmul_precision()),
        "the use of deterministic algorithms": repr(torch.are_deterministic_algorithms_enabled()),
        "autocast": repr(autocast),
    }
