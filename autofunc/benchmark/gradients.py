"""Compare a contender's gradients with those of the plain microbatch loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LEAST_SHARE = 1e-3
"""As a share of the largest norm: smaller gradients are compared on that scale, because some are zero up to rounding, such
as that of a bias before a softmax."""


def gradient_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest norm of a difference, relative to the expected norm.

    Args:
        found: gradients by path; missing ones count as zero.
        expected: gradients by path, of the parameters that this process holds.
    """
    norms = {path: float(grad.float().norm()) for path, grad in expected.items()}
    least = _LEAST_SHARE * max(norms.values(), default=0.0)
    errors = [0.0]
    for path, grad in expected.items():
        other = found.get(path)
        difference = grad.float() if other is None else other.float() - grad.float()
        scale = max(norms[path], least)
        errors.append(float(difference.norm()) / scale if scale else float(difference.norm()))
    return max(errors)


def tolerance(dtypes: set[torch.dtype], device: torch.device) -> float:
    """Return the largest `gradient_error` that counts as equal.

    Args:
        dtypes: the dtypes parameters are computed with.
        device: a GPU may choose other kernels than for the loop.
    """
    if any(dtype.itemsize < 4 for dtype in dtypes):
        return 5e-2  # torch sums them in this precision too
    return 1e-5 if device.type == "cpu" else 1e-4
