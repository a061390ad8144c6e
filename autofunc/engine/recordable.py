"""What cannot be part of a recorded step: decisions on the host, and exchanges between processes inside a stage."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from autofunc.decisions import is_check
from autofunc.engine.capture import Joint
from autofunc.errors import AutofuncError, ModelError
from autofunc.graph.lines import line_of
from autofunc.shown import quoted

_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor")
_OWN_COLLECTIVES = tuple(f"autofunc.{name}" for name in ("sum_over", "all_reduce", "all_gather", "reduce_scatter"))
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

INSTEAD = "use compile=True, which compiles pieces without recording them, or compile=False"


def check_recordable(joint: Joint, title: str) -> None:
    """Refuse a stage that cannot be recorded.

    Args:
        joint: the captured stage.
        title: of the stage.

    Raises:
        ModelError: with the reason, and the user's line.
    """
    for node in joint.graph.nodes:
        why = _reason(node)
        if why is not None:
            raise ModelError(f'compile="graphs": {title} cannot be recorded: {why}; {INSTEAD}')


def _reason(node: fx.Node) -> str | None:
    if is_check(node):
        return f"it branches on the data of each batch, and a recording cannot branch ({node.args[3]})"
    name = str(node.target)
    if name.split(".")[0] in _COLLECTIVES or name.startswith(_OWN_COLLECTIVES):
        return f"it exchanges values with other processes inside a stage ({node.target})"
    if node.target in _READS:
        return f"the host reads one of its values ({line_of(node)})"
    return None


def check_axes(is_sharded: bool, is_cut: bool) -> None:
    """Refuse parameters that do not stay in place during a step, and stages that exchange values.

    Args:
        is_sharded: parameters are gathered in each step, over the dp_shard axis or from the host.
        is_cut: tensors are cut over the tp axis.

    Raises:
        AutofuncError: with the reason.
    """
    if is_sharded:
        why = "parameters are sharded, and gathered into different memory in every step"
        raise AutofuncError(f'compile="graphs": {why}; {INSTEAD}')
    if is_cut:
        why = "tensors are cut over tp, so stages exchange values internally"
        raise AutofuncError(f'compile="graphs": {why}; {INSTEAD}')


def check_tensors(named: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Refuse entries of a batch that a recording cannot read: it would replay the first batch's values forever.

    Raises:
        AutofuncError: naming the entry.
    """
    for name, tensor in named:
        if tensor.device != device:
            raise AutofuncError(
                f'compile="graphs": {quoted(name)} is on {tensor.device}, but a recorded step reads its values on {device} '
                "only; move it there"
            )
        if tensor.layout is not torch.strided:
            raise AutofuncError(
                f'compile="graphs": {quoted(name)} is {tensor.layout}; expected a strided tensor; {INSTEAD}'
            )
