"""A model's layer as a graph of operators with the sizes of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from autofunc import tree
from autofunc.captured.segment import Segment
from autofunc.context_parallel.entries import named_tensors, refilled, tensors_in, with_tensors
from autofunc.context_parallel.traced import Traced, traced
from autofunc.fake import naming_errors
from autofunc.model import Specialised


def recorded(
    base: Specialised, name: str, params: Mapping[str, Tensor], state: Mapping[str, Tensor], x: Any, entries: Any
) -> Traced:  # fmt: skip
    """Record a layer.

    Args:
        base: the model for such microbatches.
        name: of the layer.
        params: of the layer, by path inside it, whole and fake, like all tensors here.
        state: likewise; empty for a layer without state.
        x: what the layer before returned.
        entries: from `base.share`.
    """

    def function(
        owned: Mapping[str, Tensor], received: Sequence[Tensor], given: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[Any, Mapping[str, Tensor]]:  # fmt: skip
        full = refilled(x, received)
        made, after = base.layer(name, tree.nest(owned), full, with_tensors(entries, given), {name: kept})
        return made, after[name]

    with naming_errors(f"layer {name!r}"):
        program = base.programs([name])[-1]
        known = program if isinstance(program, Segment) and program.traces else None
        return traced(function, params, tensors_in(x), named_tensors(entries), state, known)
