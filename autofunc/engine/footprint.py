"""What the pieces of a captured stage keep, in bytes by storage: views of kept values are free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from autofunc.engine.capture import Joint
from autofunc.engine.partition import Pieces
from autofunc.graph.memory import base_of, storage_bytes
from autofunc.schedule import StageBytes
from autofunc.splitting import StageContext

Node = fx.Node


def footprint(joint: Joint, pieces: Pieces, context: StageContext) -> tuple[StageBytes, bool]:
    """Measure what F keeps for B or `I`, and `I` for W, without parameters, the batch and constants.

    Returns:
        The bytes, and whether they are complete: values whose size depends on data are not counted.
    """
    values = joint.returned.boundary.values if not context.with_loss else ()
    outputs = [base_of(node) for node in joint.outputs] if values else []
    sent_back: dict[Node, int] = {}
    for order, node in enumerate(joint.input_grads):
        if node is not None:
            sent_back[base_of(node)] = order
    saved, kept = ({base_of(node) for node in nodes} for nodes in (pieces.saved, pieces.kept))
    free = {*joint.params, *joint.batch, *(joint.cotangents if context.with_loss else ())}
    received = [] if context.with_loss else joint.cotangents
    known_saved, known_kept = {*free, *joint.inputs, *outputs}, {*free, *joint.inputs, *outputs, *received, *sent_back}
    own, own_weight = saved - known_saved, kept - known_kept
    known = StageBytes(
        outputs=tuple(value.num_bytes for value in values),
        cotangents=tuple(value.num_bytes for value in values if value.needs_grad),
        residuals=_bytes(own),
        weight_residuals=_bytes(own_weight),
        accumulators=context.accumulator_bytes,
        kept_inputs=_numbers(joint.inputs, saved),
        kept_outputs=_numbers(outputs, saved),
        weight_inputs=_numbers(joint.inputs, kept),
        weight_outputs=_numbers(outputs, kept),
        weight_cotangents=_numbers(received, kept),
        weight_input_grads=tuple(sorted(order for node, order in sent_back.items() if node in kept)),
    )
    return known, all(storage_bytes(node) is not None for node in own | own_weight)


def _bytes(nodes: Iterable[Node]) -> int:
    return sum(storage_bytes(node) or 0 for node in nodes if node.op != "get_attr")


def _numbers(values: Sequence[Node], held: set[Node]) -> tuple[int, ...]:
    return tuple(number for number, node in enumerate(values) if node in held)
