"""Layers that are functions, cut over another axis as graphs, as cp ranks can record them: no DTensors, only plain tensors.

A layer is recorded with the sizes of the whole and rewritten by the rules of `spreading`. Every rank receives and returns
whole values; inside a layer they lie as its parameters are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from autofunc.captured.segment import Segment
from autofunc.context_parallel.entries import device_of, faked, named_tensors, tensors_in
from autofunc.context_parallel.program import modes_of, needed, segment_of
from autofunc.context_parallel.recorded import recorded
from autofunc.context_parallel.traced import Traced
from autofunc.experts import recorded_as_operators
from autofunc.fake import fake_mode, naming_errors
from autofunc.graph.reach import descendants
from autofunc.model import Model, Specialised
from autofunc.spreading import AxisPlan, Propagation, Rewriting, Whole


def by_layer(
    base: Specialised, model: Model, dtypes: Mapping[str, torch.dtype], microbatch: Mapping[str, Any], plan: AxisPlan
) -> Specialised:  # fmt: skip
    """Cut a model's layers, one at a time, over an axis.

    Args:
        base: the model for such microbatches, whole; its layers have no state.
        model: whose specialisation it is.
        dtypes: of canonical parameters, as ranks compute with them.
        microbatch: as layers see it.
        plan: which parameters are cut; of the gradients of all others, each rank is to have a term.

    Returns:
        The model as each rank of the axis runs it, on its parts of the parameters.
    """
    segments: dict[str, Segment] = {}
    with fake_mode() as mode, recorded_as_operators():
        batch, x = faked(mode, microbatch), None
        with naming_errors(model.title):
            entries = base.share(list(model.layers), batch)
        device = device_of(batch)
        for name in model.layers:
            homes = {path: model.canonical(path) for path in model.spec if model.layer_of(path) == name}
            params = {
                model.inner_path(path): torch.empty(model.spec[path].shape, dtype=dtypes[home], device=device)
                for path, home in homes.items()
            }
            cuts = {model.inner_path(path): plan.cuts[home] for path, home in homes.items() if home in plan.cuts}
            whole = recorded(base, name, params, {}, x, entries)
            segments[name], x = _of_rank(whole, cuts, plan, f"layer {name!r}"), whole.made
    functions = {name: _function(segment) for name, segment in segments.items()}
    return Specialised(
        functions, base.share, lambda names: [base.programs(names)[0], *(segments[name] for name in names)], base.cut_points
    )  # fmt: skip


def _of_rank(whole: Traced, cuts: Mapping[str, Any], plan: AxisPlan, what: str) -> Segment:
    graph, modes = whole.module.graph, modes_of(whole.module.graph, what)
    for node, entered in modes.items():
        node.meta["modes"] = entered
    results = [each for each in whole.returned if isinstance(each, fx.Node)]
    used, given = needed(graph, results), {*whole.params.values(), *whole.received}
    weighted = given | descendants(graph, given)
    nodes = [node for node in modes if node in used]
    names = {node: path for path, node in whole.params.items()}
    seen = Whole(nodes, weighted, names, set(results), set(whole.entries.values()))
    found = Propagation(seen, cuts, plan.size, plan.axis, sequence=plan.sequence).run()
    made = Rewriting(graph, found, [path for path in whole.params if path not in cuts])
    returned = [made.values[each] if isinstance(each, fx.Node) else each for each in whole.returned]
    return segment_of(whole, made.graph, returned, what, {})


def _function(segment: Segment) -> Callable[..., Any]:
    def function(params: Mapping[str, Any], x: Any, entries: Any) -> Any:
        return segment(params, tensors_in(x), named_tensors(entries), device_of(entries), None)[0]

    return function
