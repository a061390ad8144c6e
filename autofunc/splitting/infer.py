"""Inference of the boundaries between stages on fake tensors: nothing is allocated and nothing is negotiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc import cache, tree
from autofunc.context_parallel.specialised import OverTokens
from autofunc.fake import FakeTensorMode, fake_like, fake_mode, naming_errors, without_memory
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.splitting.boundary import Boundaries, Returned, Value, describe, outline
from autofunc.splitting.context import StageContext, specialise
from autofunc.splitting.outside import NothingTrainedOutside
from autofunc.splitting.setting import ALONE, Setting
from autofunc.splitting.stage import Stage


def infer_boundaries(
    stages: Sequence[Stage],
    params: Mapping[str, Tensor],
    microbatch: Mapping[str, Any],
    loss: Loss | None = None,
    *,
    device: torch.device | None = None,
    with_loss: bool = True,
    setting: Setting = ALONE,
) -> Boundaries:
    """Run all stages on fake tensors, one after the other.

    Args:
        stages: all stages of the model.
        params: flat parameters; only dtypes matter, and the strides of those with whole shapes. For missing ones see
            `parameter_dtypes`.
        microbatch: one microbatch.
        loss: run on the last stage's output; None means the loss in the output itself.
        device: where parameters live; the CPU by default.
        with_loss: False leaves the loss out.
        setting: the surroundings of the stages.

    Raises:
        ModelError: if a stage fails, naming it and its layers; this library's own errors pass through unchanged.
    """
    return follow(stages, params, microbatch, loss, device=device, with_loss=with_loss, setting=setting)[1]


def follow(
    stages: Sequence[Stage],
    params: Mapping[str, Tensor],
    microbatch: Mapping[str, Any],
    loss: Loss | None = None,
    *,
    device: torch.device | None = None,
    with_loss: bool = True,
    with_grads: bool = True,
    keeps_state: bool | None = None,
    setting: Setting = ALONE,
    returned_by: Callable[[StageContext], Returned] | None = None,
) -> tuple[list[StageContext], Boundaries]:
    """Follow the values that each stage sends to the next.

    Args:
        stages, params, microbatch, loss, device, with_loss, setting: see `infer_boundaries`.
        with_grads: whether the stages will be differentiated.
        keeps_state: whether new state is wanted; by default the same as `with_grads`.
        returned_by: returns a stage's outputs; by default `infer`.

    Returns:
        The stages in their surroundings, and the boundaries between them.

    Raises:
        ModelError: see `infer_boundaries`.
    """
    model = stages[0].model
    keeps = with_grads if keeps_state is None else keeps_state
    specialised, dtypes = specialise(model, parameter_dtypes(model, params), microbatch, setting, training=keeps)
    if isinstance(specialised, OverTokens) and with_loss:
        with setting.partitioning.running():
            specialised = specialised.with_loss(loss, microbatch, setting.precision.output)
    strides = _strides(model, params)
    # a pipeline keeps its stages' surroundings, and should not keep a batch alive with them
    mode = fake_mode()
    example = tree.map_leaves(
        lambda leaf: without_memory(mode, leaf) if isinstance(leaf, Tensor) else leaf, dict(microbatch)
    )
    contexts: list[StageContext] = []
    found: list[Returned] = []
    for stage in stages:
        context = StageContext(
            stage, specialised, found[-1].boundary if found else None, loss, with_loss and stage is stages[-1], with_grads,
            dtypes, example, device or torch.device("cpu"), setting, strides, keeps,
        )  # fmt: skip
        contexts.append(context)
        found.append((returned_by or infer)(context).of(stage.index))
    return contexts, Boundaries(tuple(each.boundary for each in found), found[-1].aux)


def infer(context: StageContext) -> Returned:
    """Infer a stage's outputs, once for all stages with the same fingerprint. The producer is left open: `Returned.of`."""
    return cache.shared.get(("returned", context.fingerprint), lambda: _infer(context))


def _infer(context: StageContext) -> Returned:
    partitioning = context.setting.partitioning
    with fake_mode() as mode, torch.enable_grad(), naming_errors(context.stage.title), partitioning.running():
        bound, inputs, microbatch = fake_arguments(context, mode)
        with NothingTrainedOutside(context.stage.title):
            x, _ = context.run(bound, inputs, microbatch, context.empty_state())
        if not context.with_loss:
            return Returned(context.describe(x)[0])
        with naming_errors("the loss"), NothingTrainedOutside("the loss"):
            aux = context.loss_terms(x, microbatch).aux
        return Returned(outline(x), describe(aux)[0] if aux is not None else None)


def fake_arguments(
    context: StageContext, mode: FakeTensorMode
) -> tuple[dict[str, dict[str, Any]], list[Tensor], dict[str, Any]]:
    """Return a stage's arguments as fake tensors of a mode, which must be active.

    Returns:
        The parameters as its layers receive them; the received values, as leaves that require a gradient if it is wanted;
        the microbatch.
    """
    stage, partitioning, device = context.stage, context.setting.partitioning, context.device
    bound = stage.bind(
        [
            partitioning.parameter(path, leaf).requires_grad_(wanted)
            for path, leaf, wanted in zip(stage.holders, context.empty_parameters(), stage.trainable, strict=True)
        ]
    )
    values: Sequence[Value] = context.received.values if context.received is not None else ()
    inputs = [
        torch.empty(value.shape, dtype=value.dtype, device=device).requires_grad_(value.needs_grad) for value in values
    ]
    microbatch = tree.map_leaves(
        lambda leaf: fake_like(mode, leaf) if isinstance(leaf, Tensor) else leaf, dict(context.microbatch)
    )
    return bound, inputs, microbatch


def _strides(model: Model, params: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the strides of the parameters that are not contiguous, such as weights in channels_last."""
    known = {path: leaf for path, leaf in params.items() if path in model.spec and leaf.shape == model.spec[path].shape}
    return {model.canonical(path): leaf.stride() for path, leaf in known.items() if not leaf.is_contiguous()}


def parameter_dtypes(model: Model, params: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Return the dtype of every canonical path.

    Missing parameters get the model's own dtypes if the given ones have theirs, else the dtype of the given ones.

    Args:
        model: the whole model.
        params: flat parameters.
    """
    known = {path: leaf for path, leaf in params.items() if leaf.is_floating_point() and path in model.spec}
    recast = next((leaf.dtype for path, leaf in known.items() if leaf.dtype != model.spec[path].dtype), None)
    dtypes = {}
    for path, spec in model.spec.items():
        canonical = model.canonical(path)
        default = recast if recast is not None and spec.is_floating_point() else spec.dtype
        dtypes[canonical] = params[canonical].dtype if canonical in params else default
    return dtypes
