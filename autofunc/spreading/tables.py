"""The source of the table of cuts: the user, the module itself (as in transformers), or the graph.

Words of transformers (5.23, `distributed/`): a pattern names modules or parameters, and a word tells which side of a
product is cut. The layouts in between follow from the graph, so words for gathering values, or for leaving a part
alone, are accepted and have no further effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from autofunc import tree
from autofunc.errors import ModelError, one_of
from autofunc.model import TensorParallel, cut_dims, patterns_like
from autofunc.shown import quoted
from autofunc.spreading.chains import derived_cuts, left_whole
from autofunc.spreading.layouts import Cut
from autofunc.spreading.operation import shape_of
from autofunc.spreading.propagate import Whole
from autofunc.spreading.sides import Product, products_of

OUT = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise", "local_colwise", "local_packed_colwise")
INNER = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise", "local_rowwise", "local_packed_rowwise")
ROWS = ("embedding_rowwise", "vocab_parallel", "vocab_parallel_rowwise")

WORDS = (*OUT, *INNER, *ROWS)
_PLACEMENT = re.compile(r"replicate|shard")

GIVEN = "the given table"
OWN, DERIVED, AUTO = "own", "derived", "auto"
SOURCES = (AUTO, OWN, DERIVED)


def wanted_cuts(
    whole: Whole, module: nn.Module, size: int, axis: str, table: Any, what: str
) -> tuple[dict[str, int], str, list[str]]:  # fmt: skip
    """Return parameter name -> the dim to cut, the table's source, and notes on what is not cut.

    Args:
        whole: the forward.
        module: that computes it.
        size: number of ranks.
        axis: of ranks.
        table: the user's: a `TensorParallel`, patterns, "own", "derived" or "auto"; None means "auto": the module's own if
            it has one, else derived.
        what: the module, for messages.

    Raises:
        ModelError: for a table that matches nothing, or "own" if the module has none.
        MeshError: if something does not divide.
    """
    if isinstance(table, str) and table not in SOURCES:
        raise ModelError(f"tensor parallel table {table!r}; {one_of(table, SOURCES)}")
    if isinstance(table, (TensorParallel, Mapping)):
        return _given(whole, table, size), GIVEN, []
    own = own_plan(module)
    if table == OWN and not own:
        raise ModelError(f'{what} has no tensor parallel plan of its own (_tp_plan); use "derived", or give a table')
    if own and table != DERIVED:
        found = _by_words(whole, own, axis)
        if found:
            kept, notes = _that_divide(whole, found, size)
            return kept, f"{what}'s own plan", notes
        if table == OWN:
            raise ModelError(f"{what}: its own tensor parallel plan matches none of its parameters: {', '.join(own)}")
    cuts, notes = derived_cuts(whole, size, axis)
    return cuts, "the table derived from its graph", notes


def _that_divide(whole: Whole, cuts: dict[str, int], size: int) -> tuple[dict[str, int], list[str]]:
    """Drop embeddings and heads whose vocabulary does not divide: they have no partner in a block."""
    shapes = {name: shape_of(node) for node, name in whole.params.items()}
    uneven = {
        name: Cut(dim, (shapes[name][dim],)) for name, dim in cuts.items()
        if shapes[name][dim] % size and not any(part.isdigit() for part in name.split("."))
    }  # fmt: skip
    kept = {name: dim for name, dim in cuts.items() if name not in uneven}
    return kept, [left_whole(name, cut, size) for name, cut in uneven.items()]


def own_plan(module: nn.Module) -> dict[str, str]:
    """Return the tensor parallel plan of a transformers module, or of the outermost one inside: pattern -> word."""
    for name, part in module.named_modules():
        plan = getattr(part, "_tp_plan", None)
        if isinstance(plan, Mapping) and plan:
            return {tree.join(name, pattern) if name else pattern: word for pattern, word in plan.items()}
    return {}


def _given(whole: Whole, table: TensorParallel | Mapping[str, str], size: int) -> dict[str, int]:
    spec: Any = {name: node.meta["val"] for node, name in whole.params.items()}
    words = {} if isinstance(table, TensorParallel) else {k: w for k, w in table.items() if w in WORDS}
    for pattern, word in {} if isinstance(table, TensorParallel) else table.items():
        if word not in WORDS and not _PLACEMENT.match(str(word)):
            known = ("replicate", "shard(0)", "shard(1)", *WORDS)
            raise ModelError(f"tensor parallel table, {pattern!r}: unknown word {quoted(word)}; {one_of(word, known)}")
    if words and isinstance(table, Mapping):
        for pattern in words:
            if not any(_matches(name, pattern) for name in spec):
                nearest = one_of(pattern, patterns_like(pattern, spec))
                raise ModelError(f"tensor parallel table: {pattern!r} matches no parameter; {nearest}")
        found = _by_words(whole, words, "tp")
        placed = {pattern: word for pattern, word in table.items() if pattern not in words}
        return found | (cut_dims(TensorParallel(placed), spec, 1) if placed else {})
    return cut_dims(table if isinstance(table, TensorParallel) else TensorParallel(table), spec, 1)


def _by_words(whole: Whole, words: Mapping[str, str], axis: str) -> dict[str, int]:
    positions = {node: position for position, node in enumerate(whole.nodes)}
    products = {each.weight: each for each in products_of(whole, positions, axis).values()}
    found: dict[str, int] = {}
    for node, name in whole.params.items():
        word = next((word for pattern, word in words.items() if _matches(name, pattern)), None)
        dim = _dim_of(name, len(shape_of(node)), word, products) if word is not None else None
        if dim is not None:
            found[name] = dim
    biases = {each.bias: 0 for each in products.values() if each.bias is not None and found.get(each.weight) == each.out}
    return found | biases


def _dim_of(name: str, dims: int, word: str, products: Mapping[str, Product]) -> int | None:
    product = products.get(name)
    if word in ROWS:
        return 0 if dims == 2 else None
    if product is None or word not in (*OUT, *INNER):
        return None
    return product.out if word in OUT else product.inner


def _matches(name: str, pattern: str) -> bool:
    """True if a pattern, in which `*` matches anything, names a parameter or its module."""
    exact = re.compile(re.escape(pattern).replace(r"\*", ".*"))
    return any(exact.fullmatch(each) for each in (name, name.rpartition(".")[0]))
