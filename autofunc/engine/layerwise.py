"""One stage on one microbatch, layer by layer: finds the layer that first makes values or gradients that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.context_parallel.ranks import ranks_of
from autofunc.engine.functions import Microbatch
from autofunc.splitting import StageContext
from autofunc.spread import exchanging


@dataclass
class _LayerRun:
    """One layer's run in a separate autograd graph that starts at leaves, so that it can be differentiated alone."""

    title: str
    given: list[Tensor]  # leaves it received
    params: dict[str, Tensor]  # leaves, by path
    made: list[Tensor]  # its outputs that need a gradient


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element of the floating-point and complex tensors is NaN or infinite."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in tensors if leaf.is_floating_point() or leaf.is_complex())


def any_of(context: StageContext, own: bool) -> bool:
    """Return whether the flag is set on any of the ranks that exchange values within a stage; all of them call it.

    These are the ranks that share experts or tokens, but not tp ranks.
    """
    setting = context.setting
    flag = torch.tensor([own], dtype=torch.int64, device=context.device)
    if setting.experts is not None:
        flag = setting.experts.counts(flag).sum(0)
    if setting.context is not None:
        flag = torch.stack(ranks_of(setting.context.ranks).gather(flag)).sum()
    return bool(flag)


def first_not_finite(
    context: StageContext,
    leaves: Sequence[Tensor],
    state: Sequence[Tensor],
    inputs: Sequence[Tensor],
    microbatch: Microbatch,
    cotangents: Sequence[Tensor] | None,
) -> str | None:
    """Rerun a stage by autograd until something is not finite on a rank. All ranks that exchange values within it call it.

    Args:
        context: of the stage, which must not be cut over tp ranks.
        leaves: its parameters, in the order of `Stage.holders`.
        state: of its layers, from before this microbatch.
        inputs: the values it received.
        microbatch: the microbatch.
        cotangents: of the values it hands on; None to examine the forward alone.

    Returns:
        The layer and its non-finite values, in words; "" if these are on other ranks; None if all is finite.
    """
    runs: list[_LayerRun] = []
    with torch.enable_grad(), exchanging(context.setting.experts):
        for run in _forward(context, leaves, state, inputs, microbatch, runs):
            is_bad = not all_finite(leaf.detach() for leaf in run.made)
            if any_of(context, is_bad):
                return f"{run.title} makes {_kinds(run.made)}{_of_parameters(run)}" if is_bad else ""
    return None if cotangents is None else _backward(context, runs, cotangents)


def _forward(
    context: StageContext, leaves: Sequence[Tensor], state: Sequence[Tensor], inputs: Sequence[Tensor],
    microbatch: Microbatch, runs: list[_LayerRun],
) -> Iterable[_LayerRun]:  # fmt: skip
    stage, partitioning, precision = context.stage, context.setting.partitioning, context.setting.precision
    fresh = [leaf.detach().requires_grad_(wanted) for leaf, wanted in zip(leaves, stage.trainable, strict=True)]
    bound, states = stage.bind(fresh), stage.bind_state(list(state))
    received = [leaf.detach().requires_grad_(wants) for leaf, wants in zip(inputs, context.input_wants, strict=True)]
    x = context.received.assemble(received, partitioning) if context.received is not None else None
    entries = context.specialised.share(stage.layers, precision.batch(microbatch.entries))
    for name in stage.layers:
        x, given = _cut(x)
        own = {path: leaf for path, leaf in zip(stage.holders, fresh, strict=True) if stage.model.layer_of(path) == name}
        x, states = context.specialised.layer(name, bound[name], x, entries, states)
        runs.append(_LayerRun(f"layer {name!r}", given, own, _differentiable(x)))
        yield runs[-1]
    x, given = _cut(precision.output(x) if stage.is_last else x)
    if context.with_loss:
        runs.append(_LayerRun("the loss", given, {}, [context.loss_terms(x, microbatch.entries).sum]))
    else:
        runs.append(_LayerRun("the stage's outputs", given, {}, _passed_on(context, x)))
    yield runs[-1]


def _backward(context: StageContext, runs: Sequence[_LayerRun], cotangents: Sequence[Tensor]) -> str | None:
    seeds: list[Tensor | None] = [torch.ones_like(runs[-1].made[0])] if context.with_loss else list(cotangents)
    for run in reversed(runs):
        pairs = [
            (made, seed) for made, seed in zip(run.made, seeds, strict=True) if seed is not None and made.requires_grad
        ]
        params = {path: leaf for path, leaf in run.params.items() if leaf.requires_grad}
        wanted = [leaf for leaf in (*run.given, *params.values()) if leaf.requires_grad]
        grads: list[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            made, given = zip(*pairs, strict=True)
            grads = list(torch.autograd.grad(made, wanted, given, allow_unused=True))
        by_leaf = {id(leaf): grad for leaf, grad in zip(wanted, grads, strict=True)}
        seeds = [by_leaf.get(id(leaf)) for leaf in run.given]
        bad = [f"the gradient of {path!r}" for path, leaf in params.items() if not _finite(by_leaf[id(leaf)])]
        if not all(map(_finite, seeds)):
            bad.insert(0, "the gradient of its input")
        if any_of(context, bool(bad)):
            return f"{run.title}: {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''}" if bad else ""
    return None


def _finite(grad: Tensor | None) -> bool:
    return grad is None or all_finite([grad])


def _cut(x: Any) -> tuple[Any, list[Tensor]]:
    """Return the same values as leaves of a new graph, and those of them that need gradients."""
    leaves: list[Tensor] = []

    def leaf_of(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    return tree.map_leaves(leaf_of, x), leaves


def _differentiable(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves_and_spec(x)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]


def _passed_on(context: StageContext, x: Any) -> list[Tensor]:
    boundary, tensors = context.describe(x)
    return [leaf for value, leaf in zip(boundary.values, tensors, strict=True) if value.needs_grad]


def _kinds(tensors: Sequence[Tensor]) -> str:
    is_nan = any(bool(torch.isnan(leaf.detach()).any()) for leaf in tensors)
    return "NaN" if is_nan else "infinite values"


def _of_parameters(run: _LayerRun) -> str:
    bad = [path for path, leaf in run.params.items() if not all_finite([leaf.detach()])]
    return f"; its parameter {bad[0]!r} was not finite before the step" if bad else ""
