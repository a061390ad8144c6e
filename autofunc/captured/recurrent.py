"""Recurrent layers step by step: the fused kernel of CPUs keeps a workspace, which no graph can hand on to its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_LSTM = (torch.ops.aten.lstm.input, torch.ops.aten.lstm.data)


def lstm(*args: Any) -> Any:
    """`aten.lstm` without oneDNN."""
    with torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None):
        return torch.ops.aten.lstm(*args)


def unfuse(graph: fx.Graph) -> None:
    """Change a graph in place."""
    for node in graph.nodes:
        if node.target in _LSTM:
            node.target = lstm
