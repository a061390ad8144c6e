"""Every place of a mask, in order, instead of only those where it is true; the rest is discarded later.

The number of true elements differs from batch to batch, but shapes are fixed. Three operators, which only an export has,
mark where this happens; `rows_back.py` takes them out of the graph again.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

_REASON = "the data decides how many rows"
ROWS_OF_DATA = (
    f"{{what}}: {_REASON} {{maker}} makes ({{line}}), and shapes are fixed in a pipeline; keep all rows: "
    "ignore_index for labels, torch.where or a product with the mask, a fixed capacity for experts"
)
"""The reason for a refusal. `what` names the captured forward, `maker` makes the rows, and `line` is the user's."""


def is_rows_of_data(error: Exception) -> bool:
    """True if an error was raised for this reason."""
    return _REASON in str(error)


torch.library.define("autofunc::all_places", "(Tensor mask, str line) -> Tensor[]")
torch.library.define("autofunc::body", "(Tensor places, int index, int? number) -> Tensor")
torch.library.define("autofunc::body_end", "(Tensor element) -> ()")


def _places(mask: Tensor, line: str) -> list[Tensor]:
    return [mask.new_empty(mask.numel(), dtype=torch.int64) for _ in mask.shape]


def _element(places: Tensor, index: int, number: int | None) -> Tensor:
    return places.new_empty(places.shape[1:])


def _end(element: Tensor) -> None:
    """A marker: only its position in the graph matters."""


torch.library.register_fake("autofunc::all_places", _places)
torch.library.register_fake("autofunc::body", _element)
torch.library.register_fake("autofunc::body_end", _end)
fx.has_side_effect(torch.ops.autofunc.body_end.default)


def all_places(mask: Tensor, line: str) -> list[Tensor]:
    """Return all places of a mask, as `mask.nonzero(as_tuple=True)` returns those where it is true.

    Args:
        mask: bool, with at least one dim; fake.
        line: the user's line that asks for them.

    Returns:
        One tensor per dim: int64, with as many elements as the mask.
    """
    return list(torch.ops.autofunc.all_places(mask, line))


def body(places: Tensor, index: int, number: int | None) -> Tensor:
    """Return one element of such places; what runs from here to `end_body` counts only where the mask is true there.

    Args:
        places: of a mask, along dim 0.
        index: which element.
        number: its value; None if it consists of several.
    """
    element: Tensor = torch.ops.autofunc.body(places, index, number)
    return element


def end_body(element: Tensor) -> None:
    """Mark the end of what runs for an element."""
    torch.ops.autofunc.body_end(element)


def is_places(node: fx.Node) -> bool:
    """True if a node makes all places of a mask."""
    return node.op == "call_function" and node.target is torch.ops.autofunc.all_places.default


def is_body(node: fx.Node) -> bool:
    """True if a node begins what runs for one element."""
    return node.op == "call_function" and node.target is torch.ops.autofunc.body.default


def is_body_end(node: fx.Node) -> bool:
    """True if a node ends it."""
    return node.op == "call_function" and node.target is torch.ops.autofunc.body_end.default
