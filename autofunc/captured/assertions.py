"""What a captured forward only checks is left out: a graph of operators has no place to stop at."""

from __future__ import annotations

import torch
from torch import fx

from autofunc.graph.lines import line_of

_CHECKS = ("aten._assert_async", "aten._assert_scalar")  # of values
_OTHERS = ("aten._assert_tensor_metadata", "aten.sym_constrain_range")
_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def leave_out_assertions(root: fx.GraphModule) -> list[str]:
    """Erase assertions in a graph and those inside it, and the numbers that only they read; what to tell the user."""
    notes: dict[str, None] = {}
    for part in root.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in reversed(part.graph.nodes):
            name = str(node.target)
            if name.startswith(_CHECKS):
                notes[f"a check of the values of its inputs is not made ({line_of(node)})"] = None
            elif not name.startswith(_OTHERS) and not (isinstance(node.meta.get("val"), _NUMBERS) and not node.users):
                continue
            if node.op == "call_function":
                part.graph.erase_node(node)
    return list(notes)
