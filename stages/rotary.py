"""Rotary positions, and their scaling for longer contexts.

Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.2.2; scalings and numerics as in Hugging Face transformers,
`modeling_rope_utils.py`, halves paired as there.

Shapes: B rows, N heads, T tokens, H features per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autofunc.errors import ModelError, one_of

Scaling = Mapping[str, Any]

SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""`rope_type` -> the numbers it requires."""


def rotary(places: Tensor, features: int, theta: float, scaling: Scaling | None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for every position, fp32, shape (..., T, H).

    Args:
        places: of the tokens, shape (..., T).
        features: H.
        theta: base of the wavelengths.
        scaling: as `check_scaling` takes it.
    """
    exponent = torch.arange(0, features, 2, dtype=torch.float32, device=places.device) / features
    frequency = _stretched(1.0 / theta**exponent, scaling or {})
    angle = places.float().unsqueeze(-1) * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate each pair of features by its position's angle, (B, N, T, H) -> (B, N, T, H)."""
    half = x_BNTH.shape[-1] // 2
    turned = torch.cat((-x_BNTH[..., half:], x_BNTH[..., :half]), dim=-1)
    return x_BNTH * cos_TH.to(x_BNTH.dtype) + turned * sin_TH.to(x_BNTH.dtype)


def check_scaling(module: str, scaling: Scaling | None) -> None:
    """Refuse a scaling that is unknown or incomplete; None means no scaling.

    Raises:
        ModelError: naming the known ones.
    """
    if scaling is None:
        return
    kind = _kind(scaling)
    if kind not in SCALINGS:
        raise ModelError(f"{module}: rope_scaling of type {kind!r} is not supported; {one_of(kind, SCALINGS)}")
    for name in SCALINGS[kind]:
        if not isinstance(scaling.get(name), (int, float)) or scaling[name] <= 0:
            raise ModelError(
                f"{module}: rope_scaling of type {kind!r} has {name}={scaling.get(name)!r}; expected a number > 0"
            )


def rope_from_hf(module: str, settings: Mapping[str, Any], theta: float) -> tuple[float, Scaling | None]:
    """Return `rope_theta` and `rope_scaling` of a configuration; transformers 5 has one entry, `rope_parameters`.

    Args:
        module: for error messages.
        settings: the configuration.
        theta: default of `rope_theta`.

    Raises:
        ModelError: for positions that differ by layer or rotate only part of the features.
    """
    given = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ModelError(f"{module}: rope_parameters by type of layer are not supported; expected one for all layers")
    theta = given.pop("rope_theta", None) or settings.get("rope_theta") or theta
    part = given.pop("partial_rotary_factor", None) or settings.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise ModelError(f"{module}: partial_rotary_factor={part} is not supported; expected 1.0")
    return theta, None if _kind(given) == "default" else given


def _kind(scaling: Scaling) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _stretched(frequency: Tensor, scaling: Scaling) -> Tensor:
    """Scale frequencies. Llama 3 keeps short wavelengths, divides long ones' frequencies, and interpolates in between."""
    kind = _kind(scaling)
    if kind == "default":
        return frequency
    divided = frequency / float(scaling["factor"])
    if kind == "linear":
        return divided
    low, high, length = (float(scaling[name]) for name in SCALINGS["llama3"][1:])
    wavelength = 2 * math.pi / frequency
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * divided + smooth * frequency
    stretched = torch.where(wavelength > length / low, divided, between)
    return torch.where(wavelength < length / high, frequency, stretched)
