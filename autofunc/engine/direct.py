"""Shortcuts to operators: torch functions and methods that dispatch exactly the operator a graph names.

A graph names operators as `torch.ops.aten.mm.default`; calling one goes through Python code that looks up its overload,
which costs 0.4 to 1 us. A piece of small layers calls hundreds, so that is up to a tenth of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten

DIRECT: Mapping[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.clone.default: Tensor.clone,
    _aten.div.Tensor: torch.div,
    _aten.expand.default: Tensor.expand,
    _aten.mm.default: torch.mm,
    _aten.mul.Tensor: torch.mul,
    _aten.neg.default: torch.neg,
    _aten.permute.default: torch.permute,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.squeeze.dim: torch.squeeze,
    _aten.sub.Tensor: torch.sub,
    _aten.sum.dim_IntList: torch.sum,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: Tensor.view,
}
"""Operator -> a function or method that takes the same arguments and calls it."""
