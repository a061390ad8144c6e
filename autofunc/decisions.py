"""What a captured forward decided on its example is checked on every batch: an operator that stops the step otherwise."""

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
            f"a captured forward goes one way, and this microbatch would go another: {line} reads {now}, and on the "
            f"example batch it was {then}. Give an example that goes as all batches do, or {_INSTEAD[kind]}"
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
    """Go on only where a tensor has the value that was seen on the example. On an accelerator the host waits for it.

    Args:
        found: of one element; of "count", of any shape.
        kind: what is made of it: "bool", "int", or "count", how many elements are true. Any other is for a graph that is
            not run.
        value: of the example.
        line: the user's, that reads it.

    Raises:
        BatchError: when it has another.
    """
    torch.ops.autofunc.decided(found.detach(), kind, value, line)


def is_check(node: fx.Node) -> bool:
    """Whether a node of a graph is such a check, which runs though nothing reads it."""
    return node.op == "call_function" and node.target is torch.ops.autofunc.decided.default
