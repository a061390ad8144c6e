"""A layer's function with adapters: the unmodified layer, with changed products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from autofunc import random, tree
from autofunc.adapters.adapter import HELD, A, B, Held
from autofunc.adapters.products import Change, ChangedProducts, Drop
from autofunc.errors import ModelError

KeyOf = Callable[[Any], Tensor | None]
"""Returns the key of a microbatch from the result of `Specialised.share`."""


def with_adapters(layer: str, function: Callable[..., Any], held: Sequence[Held], key_of: KeyOf) -> Callable[..., Any]:
    """Return a `LayerFunction` or a `StatefulFunction` that takes the factors along with the layer's parameters.

    Args:
        layer: its name.
        function: of the plain layer.
        held: its adapters.
        key_of: returns the key that dropout draws from.

    Returns:
        A function of the same signature. It raises a ModelError if the layer does not multiply by an adapted weight.
    """

    def apply(params: Mapping[str, Any], x: Any, entries: Any, *state: Any) -> Any:
        own = tree.flatten({name: value for name, value in params.items() if name not in HELD.values()})
        a, b = (tree.flatten(params[HELD[name]]) for name in (A, B))
        products, key = ChangedProducts(layer), key_of(entries)
        for each in held:
            left, right = each.adapter.factors(a[each.weight], b[each.weight])
            drop = _dropout(each, key, f"{layer}.{each.weight}.lora")
            weight = own[each.weight]
            products.change(weight, Change(left, right, each.adapter.size.scale, each.weight, drop))
        with products, _nothing_run_again(layer):
            made = function(tree.nest(own), x, entries, *state)
        products.check_read()
        return made

    return apply


@contextmanager
def _nothing_run_again(layer: str) -> Iterator[None]:
    """Refuse `torch.utils.checkpoint`: its recomputation during backward would run without adapters."""
    words = (
        f"layer {layer!r} has adapters and calls torch.utils.checkpoint, which would recompute it without them; remove "
        "the call, and pass remat='layer' to af.pipeline"
    )
    try:
        with disable_saved_tensors_hooks(words):
            yield
    except RuntimeError as error:
        if str(error) != words:
            raise
        raise ModelError(words) from None


def _dropout(held: Held, key: Tensor | None, name: str) -> Drop | None:
    """Return dropout that draws afresh for each product; None without a key, as in evaluation."""
    if key is None or not held.adapter.size.dropout:
        return None
    calls = iter(range(1 << 30))

    def drop(x: Tensor) -> Tensor:
        return random.dropout(x, held.adapter.size.dropout, {random.KEY: key}, f"{name}#{next(calls)}")

    return drop
