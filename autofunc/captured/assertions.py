"""Assertions are dropped from captured forwards: a graph of operators cannot stop."""

from __future__ import annotations

import torch
from torch import fx

from autofunc.graph.lines import line_of

_CHECKS = ("aten._assert_async", "aten._assert_scalar")  # of values
_OTHERS = ("aten._assert_tensor_metadata", "aten.sym_constrain_range")
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def leave_out_assertions(root: fx.GraphModule) -> list[str]:
    """Erase assertions in a graph and its subgraphs, and the numbers only they read; return notes for the user."""
    notes: dict[str, None] = {}
    for part in root.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in reversed(part.graph.nodes):
            name = str(node.target)
            if name.startswith(_CHECKS):
                notes[f"a check of its inputs' values is dropped ({line_of(node)})"] = None
            elif not name.startswith(_OTHERS) and not (isinstance(node.meta.get("val"), _NUMBERS) and not node.users):
                continue
            if node.op == "call_function":
                part.graph.erase_node(node)
    return list(notes)
