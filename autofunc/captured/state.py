"""Buffers that forward writes to become state: the written value becomes one that the layer returns.

`running.mul_(0.9).add_(x)` becomes `running1 = running * 0.9; running2 = running1 + x`, and `running2` is the new state.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from autofunc.captured.export import Exported
from autofunc.captured.functional import families, rewrite
from autofunc.errors import ModelError
from autofunc.graph.lines import line_of
from autofunc.graph.memory import base_of, written
from autofunc.graph.schema import arguments
from autofunc.spread import current_data

Node = fx.Node

_aten = torch.ops.aten


def instance_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, use_input_stats: bool, momentum: float, eps: float,
    cudnn: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Apply instance normalisation; return the result and the updated statistics."""
    mean, variance = mean.clone(), variance.clone()
    made = torch.instance_norm(x, weight, bias, mean, variance, use_input_stats, momentum, eps, cudnn)
    return made, mean, variance


def synchronised_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, training: bool, momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Apply batch normalisation by the statistics of all data parallel ranks, and update the running ones.

    On one process it is torch's. The results are those of `aten._native_batch_norm_legit_functional`: the normalised
    values, the batch's own statistics, and the running ones.
    """
    data = current_data()
    if data is None:
        made: tuple[Tensor, ...] = _aten._native_batch_norm_legit_functional.default(
            x, weight, bias, mean, variance, training, momentum, eps
        )
        return made
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    wide = x.float() if x.dtype.itemsize < 4 else x
    count = data.size * x.numel() // x.shape[1]
    own_mean = data.sum(wide.sum(dims)) / count
    centred = wide - own_mean.view(shape)
    own_variance = data.sum(centred.square().sum(dims)) / count
    y = centred * torch.rsqrt(own_variance + eps).view(shape)
    if weight is not None and bias is not None:
        y = y * weight.view(shape) + bias.view(shape)
    kept = [
        old.lerp(new.detach().to(old.dtype), momentum)
        for old, new in ((mean, own_mean), (variance, own_variance * (count / max(count - 1, 1))))
    ]
    return y.to(x.dtype), own_mean, own_variance, *kept


def take_states(exported: Exported, module: nn.Module, what: str) -> None:
    """Change a graph so that it writes to no buffer; `exported.states` gets the values it wrote.

    Args:
        exported: the captured module.
        module: the module, whose parts say which norms are synchronised.
        what: a name for messages.

    Raises:
        ModelError: for a write without a functional form.
    """
    for node in list(exported.graph.nodes):
        if written(node) and node.target in (_aten.batch_norm.default, _aten.instance_norm.default):
            place = node.meta["modules"][-1][1] if node.meta["modules"] else ""
            _make_functional(exported.graph, node, isinstance(module.get_submodule(place), nn.SyncBatchNorm))
    owners: dict[Node, list[Node]] = {}
    for node in exported.graph.nodes:
        for target in written(node):
            if base_of(target) in exported.buffers:
                owners.setdefault(base_of(target), []).append(node)
    lying = families(exported.graph, owners)
    written_to = {base_of(target) for node in exported.graph.nodes for target in written(node)}.difference(owners)
    for buffer, writes in owners.items():
        after = rewrite(exported.graph, buffer, lying[buffer], gradients=False)
        if after is None:
            raise ModelError(
                f"{what} writes to its buffer {exported.buffers[buffer]!r} in a way that has no functional form "
                f"({writes[0].target}; {line_of(writes[0])}); write to the whole buffer: self.buffer.copy_(...)"
            )
        _copy_where_made(after, written_to)
        exported.states[buffer] = after
    exported.graph.lint()


def _copy_where_made(after: Node, written_to: Container[Node]) -> None:
    """Move the copy of a buffer's new value to where the value is made: into its layer, rather than to the end."""
    source = after.args[0] if after.args else None
    if after.target is not _aten.clone.default or not isinstance(source, Node) or source.op == "placeholder":
        return
    if base_of(source) not in written_to:
        source.append(after)
        after.meta.update({key: source.meta[key] for key in ("modules", "stack_trace") if key in source.meta})


def _make_functional(graph: fx.Graph, norm: Node, is_synchronised: bool) -> None:
    """Replace a norm that updates its running statistics, which its schema does not declare."""
    given = arguments(norm)
    statistics = [given["running_mean"], given["running_var"]]
    function: Callable[..., Any]
    names: Sequence[str]
    if norm.target is _aten.batch_norm.default:
        function = synchronised_batch_norm if is_synchronised else _aten._native_batch_norm_legit_functional.default
        places = (3, 4)
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    else:
        function, places = instance_norm, (1, 2)
        names = list(given)
    value, kept = norm.meta["val"], [node.meta["val"] for node in statistics]
    with graph.inserting_before(norm):
        several = graph.call_function(function, tuple(given[name] for name in names))
        made = [graph.call_function(getitem, (several, place)) for place in (0, *places)]
        copies = [
            graph.call_function(_aten.copy_.default, (buffer, part))
            for buffer, part in zip(statistics, made[1:], strict=True)
        ]
    for node in (several, *made, *copies):
        node.meta.update({key: norm.meta[key] for key in ("modules", "modes", "stack_trace") if key in norm.meta})
    with value.fake_mode:
        fresh = [torch.empty_like(each) for each in kept]
    for node, each in zip((*made, *copies), (value, *fresh, *kept), strict=True):
        node.meta["val"] = each
    several.meta["val"] = (value, *fresh)
    norm.replace_all_uses_with(made[0])
    graph.erase_node(norm)
