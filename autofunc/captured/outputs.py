"""The outputs of a forward that matter for training."""

from __future__ import annotations

from typing import Any

from autofunc import tree

CACHE = "its cache of keys and values is for generation, and is dropped from its outputs"
FIRST_IS_LOSS = "it returns a tuple that begins with a scalar: without a loss_fn, that is the loss"


def without_caches(outputs: Any) -> tuple[Any, bool]:
    """Return outputs with None for transformers' caches, and whether there were any."""
    found = [leaf for leaf in tree.leaves_and_spec(outputs)[0] if _is_cache(leaf)]
    if not found:
        return outputs, False
    return tree.map_leaves(lambda leaf: None if _is_cache(leaf) else leaf, outputs), True


def _is_cache(leaf: Any) -> bool:
    """True for a transformers cache, recognised by name so that `transformers` need not be imported."""
    return any((cls.__module__, cls.__name__) == ("transformers.cache_utils", "Cache") for cls in type(leaf).__mro__)
