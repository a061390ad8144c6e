"""A check on every batch that a captured forward's decisions are those of its example: an operator that stops the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autofunc.errors import BatchError

torch.library.define("autofunc::decided", "(Tensor found, str kind, int value, str line) -> ()")


@torch.library.impl("autofunc::decided", "CompositeExplicitAutograd")
def _compare(found: Tensor, kind: str, value: int, line: str) -> None:
    read = _READ[kind]
    now, then = read(found.detach()), bool(value) if kind == "bool" else value
    if now != then:
        raise BatchError(
            f"a captured forward takes one branch, and this microbatch would take another: {line} reads {now}, and on "
            f"the example batch it was {then}. Give an example that takes the branch of all batches, or {_INSTEAD[kind]}"
        )


def _ignore(found: Tensor, kind: str, value: int, line: str) -> None:
    """Fake tensors have no values."""


torch.library.register_fake("autofunc::decided", _ignore)
fx.has_side_effect(torch.ops.autofunc.decided.default)

_INSTEAD = {
    "bool": "decide on tensors: torch.where",
    "int": "keep it a tensor: a mask for a length",
    "count": "keep all rows: ignore_index for labels, torch.where or a product with the mask",
}
_READ: dict[str, Any] = {"bool": bool, "int": int, "count": lambda found: int(found.sum())}


def decided(found: Tensor, kind: str, value: int, line: str) -> None:
    """Stop the step unless a tensor has the value it had on the example. On an accelerator the host waits for it.

    Args:
        found: of one element; for "count" of any shape.
        kind: how it is read: "bool", "int", or "count", the number of true elements. Other kinds are for graphs that are
            not run.
        value: on the example.
        line: the user's line that reads it.

    Raises:
        BatchError: if the value differs.
    """
    torch.ops.autofunc.decided(found.detach(), kind, value, line)


def is_check(node: fx.Node) -> bool:
    """Return whether a graph's node is such a check, which must run although nothing reads it."""
    return node.op == "call_function" and node.target is torch.ops.autofunc.decided.default
