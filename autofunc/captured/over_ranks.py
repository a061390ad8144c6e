"""A captured forward over the ranks of an axis: from the cuts of its parameters to the graph that each rank runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from autofunc.captured import keyed_parts as keyed_parts  # registers its rules
from autofunc.captured.export import Exported
from autofunc.captured.flow import Flow
from autofunc.errors import MeshError
from autofunc.spreading import AxisPlan, Propagation, Rewriting, Whole, settled, wanted_cuts


def whole_of(flow: Flow) -> Whole:
    """Return a captured forward as rules see it."""
    exported = flow.exported
    nodes = [node for node in flow.nodes if node in flow.alive]
    return Whole(nodes, flow.weighted, exported.params, {*flow.returned, *exported.states.values()}, set(exported.inputs))


def planned(
    flow: Flow, module: nn.Module, axis: str, size: int, table: Any, *, sequence: bool, what: str
) -> AxisPlan:  # fmt: skip
    """Plan how the ranks of an axis compute a forward together, see `Model.over_ranks`.

    Raises:
        MeshError: if nothing can be cut.
    """
    whole = whole_of(flow)
    wanted, source, notes = wanted_cuts(whole, module, size, axis, table, what)
    made = settled(whole, wanted, size, axis, sequence=sequence, source=source)
    if not made.cuts and size > 1:
        why = f": {notes[0]}" if notes else "; give your own table, or use tp=1"
        raise MeshError(f"tp={size}: nothing in {what} can be cut by {source}{why}")
    return replace(made, notes=(*made.notes, *notes))


def over_ranks(flow: Flow, over: AxisPlan, what: str) -> Flow:
    """Return the forward that each rank of an axis runs.

    Args:
        flow: the forward with the sizes of the whole.
        over: how the ranks share it.
        what: the module, for messages.
    """
    exported = flow.exported
    found = Propagation(whole_of(flow), over.cuts, over.size, over.axis, sequence=over.sequence).run()
    made = Rewriting(exported.graph, found, over.terms)
    new = made.values
    return Flow(
        Exported(
            made.graph, exported.output,
            params={new[node]: name for node, name in exported.params.items()},
            buffers={new[node]: name for node, name in exported.buffers.items()},
            states={new[node]: new[after] for node, after in exported.states.items()},
            constants={new[node]: value for node, value in exported.constants.items()},
            inputs={new[node]: number for node, number in exported.inputs.items()},
            markers={name: made.first[node] for name, node in exported.markers.items() if node in made.first},
            evaluated=exported.evaluated, notes=exported.notes, outline=exported.outline,
        ),
        what,
    )  # fmt: skip
