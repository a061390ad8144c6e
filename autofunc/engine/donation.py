"""Donated state: a stage that writes a part of its state writes it in place.

A key-value cache holds all tokens, and a step writes one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autofunc.engine.capture import Joint
from autofunc.graph.memory import base_of

Node = fx.Node

_aten = torch.ops.aten
_IN_PLACE: Mapping[Any, Any] = {
    _aten.index_copy.default: _aten.index_copy_.default,
    _aten.index_put.default: _aten.index_put_.default,
}


def donated(joint: Joint) -> tuple[Joint, dict[Node, Any]]:
    """Reuse the old state's memory for the new state where possible.

    Args:
        joint: without gradients; its graph is not changed.

    Returns:
        The stage, and the in-place operator for each node that writes to old state.
    """
    new_states = [_without_copy(node, joint) for node in joint.new_states]
    writing = {
        made: _IN_PLACE[made.target]
        for state, made in zip(joint.states, new_states, strict=True)
        if made.target in _IN_PLACE and made.args[0] is state and list(state.users) == [made]
    }
    return replace(joint, new_states=new_states), writing


def _without_copy(node: Node, joint: Joint) -> Node:
    """Return what a new state was copied from, if that is itself an in-place write and returned nowhere else."""
    source = node.args[0] if node.target is _aten.clone.default else None
    if not isinstance(source, Node) or source.target not in _IN_PLACE or base_of(source) is not source:
        return node
    return node if source in (*joint.outputs, *joint.new_states) else source
