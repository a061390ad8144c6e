"""The whole-module law: a captured, cut module computes the loss and gradients of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autofunc import tree
from autofunc.captured import Branches, CapturedModel, Pretrained, capture_module
from autofunc.captured.module import source_of
from autofunc.captured.side_effects import restored, written_back
from autofunc.captured.torch_cond import python_control_flow
from autofunc.captured.without_dropout import still
from autofunc.engine import GraphStage, Microbatch
from autofunc.errors import ModelError, SplitError
from autofunc.losses import Loss, evaluate, own_loss
from autofunc.model import Model
from autofunc.runtime.accumulate import Accumulator
from autofunc.runtime.build import captured
from autofunc.schedule import Kind
from autofunc.splitting import Stage, follow, split


class NotComparable(ModelError):
    """Two runs of a module give different values, so it cannot be compared."""


class LossAndGrads(NamedTuple):
    """Results for one batch."""

    loss: Tensor
    grads: dict[str, Tensor | None]  # by path; None is a zero
    state: Mapping[str, Tensor]  # by path, after the batch


def from_module(
    module: nn.Module | Pretrained,
    example_batch: Mapping[str, Any],
    *,
    inputs: Sequence[str] | Mapping[str, str] | None = None,
    trainable: Sequence[str] | None = None,
    weights: str | Path | None = None,
    verify: bool = False,
    branches: Branches = "example",
) -> CapturedModel:
    """Turn any module into a model of named pure layers. The module is captured as it is, never copied or changed.

    Layers are the items of its outermost module lists, and the modules beside these lists; `af.split` takes the name of any
    module that runs once. Parameters keep their names. A parameter used by several layers is tied. Dropout and other random
    numbers become functions of the key; without a key there is no dropout, and modules with other randomness run in eval
    mode. A module on the meta device is captured without weights, and initialised layer by layer by its own initialisers.
    It can be cut over tensor, context and expert parallel ranks, see `docs/parallelism.md`.

    Args:
        module: to capture, in its current mode (train or eval); or the result of `af.AutoModel.from_pretrained`, whose
            parameters on the meta device are read from its files when they are asked for.
        example_batch: a batch; only shapes and dtypes matter, unless forward decides by values. Other shapes are captured
            when they occur.
        inputs: entries that forward gets: names of entries in the order of its arguments, or argument -> entry. By default
            the entries that forward names; all of them if it takes any (`**kwargs`).
        trainable: patterns of the parameters that get gradients; by default those with `requires_grad`.
        weights: a `.safetensors` file, or a folder with one or with shards: parameters and buffers take their values from
            it instead of from the module.
        verify: run the batch through the module and through the captured stages, both without dropout, and compare loss
            and all gradients. Modules with other randomness, such as stochastic depth, run in eval mode in both. Needs real
            weights, and a few times their memory.
        branches: for a forward that decides by tensor values (`if`, `assert`, `.item()`). "example": capture the branch the
            example batch takes; a microbatch that takes another stops the step with a `BatchError`, and on an accelerator
            the host waits for each decision. "refuse": refuse the module.

    Returns:
        A model for `af.split`. `model.init()` copies the module's or stored weights, and makes those on the meta device
        from a seed. `model.module` is the module.

    Raises:
        ModelError: for a module that cannot be captured or writes to its inputs; for weights that do not fit it; for
            parameters that no layer uses; for a loss or gradient that differs from the module's, or cannot be compared
            because the module draws random numbers in eval mode too.

    Example:
        model = af.from_module(GPT2LMHeadModel(config), {"input_ids": ids})
        stages = af.split(model, ["h.4", "h.8"])
    """
    model = capture_module(module, example_batch, inputs=inputs, trainable=trainable, weights=weights, branches=branches)
    if verify:
        found = differences(model, example_batch)
        if found:
            raise ModelError(f"{model.title} changed when captured: {'; '.join(found[:3])}")
    return model


def differences(model: CapturedModel, batch: Mapping[str, Any], loss: Loss | None = None) -> list[str]:
    """Describe differences between a captured module's loss, gradients and new state and the original's; empty if none.

    Args:
        model: one whose module has real weights.
        batch: all of its rows are run.
        loss: see `af.pipeline`; if neither it nor the outputs give a loss, a weighted sum of all outputs is used.

    Raises:
        ModelError: if the module has no weights, or its stages cannot be captured.
        NotComparable: if it draws random numbers in eval mode too.
    """
    source = source_of(model)
    on_meta = [name for name, leaf in source.module.state_dict(keep_vars=True).items() if leaf.is_meta]
    if on_meta:
        raise ModelError(f"{model.title}: {on_meta[0]!r} is on the meta device; a comparison runs it, so give it weights")
    entries = tree.map_leaves(
        lambda leaf: leaf.to(model.device) if isinstance(leaf, Tensor) else leaf,
        {name: value for name, value in batch.items() if name != model.key_name},
    )
    evaluation = model.without_key(entries)
    if evaluation.drawn:
        raise NotComparable(
            f"{evaluation.drawn}, in eval mode too, so two runs cannot be compared; compare it with its random numbers "
            "given in the batch"
        )
    params = {
        path: leaf.requires_grad_(model.is_trainable(path))
        for path, leaf in model.init_paths(model.spec, 0, model.device).items()
    }
    buffers = {name: source.buffer(name).detach().clone() for name, _ in source.module.named_buffers()}

    def called(entries: Mapping[str, Any]) -> Any:
        args, kwargs = source.arguments(source.select(entries))
        with restored(source.module), python_control_flow():
            _hold(source.module, buffers)
            with written_back(source.module):
                outputs = torch.func.functional_call(source.module, params, args, kwargs)
        return tree.with_known_classes(outputs)

    with still(source.module, evaluation.parts):
        own = _of_module(called, params, buffers, entries, loss)
    found = _of_stages(_stages(model), params, entries, loss)
    words = []
    if not close(found.loss.to(own.loss.dtype), own.loss):
        words.append(f"the loss is {found.loss.item():.6g}, the module's is {own.loss.item():.6g}")
    for path, expected in own.grads.items():
        given = found.grads[path]
        one, other = (torch.zeros_like(params[path]) if grad is None else grad for grad in (given, expected))
        if not close(one.to(other.dtype), other):
            off = float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
            words.append(f"the gradient of {path!r} is off by {off:.1e} of its largest element")
    words += [f"the new state {path!r} differs" for path, leaf in found.state.items() if not close(leaf, own.state[path])]
    return words


def _hold(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Put tensors in place of a module's buffers; within `restored`."""
    names = {id(leaf): name for name, leaf in module.named_buffers()}
    for part in module.modules():
        for name, leaf in part._buffers.items():
            if leaf is not None:
                part._buffers[name] = buffers[names[id(leaf)]]


def scalar_of(loss: Loss | None) -> Loss:
    """Return the loss, else the outputs' own, else a weighted sum of all outputs."""

    def scalar(outputs: Any, microbatch: Mapping[str, Any]) -> Any:
        if loss is not None or own_loss(outputs) is not None:
            terms = evaluate(loss, outputs, microbatch)
            return terms.sum, terms.weight
        leaves = [leaf for leaf in tree.leaves_and_spec(outputs)[0] if isinstance(leaf, Tensor)]
        parts = [leaf for leaf in leaves if leaf.is_floating_point()]
        weighed = [
            (part * torch.linspace(0.5, 1, part.numel(), device=part.device).view(part.shape)).sum() for part in parts
        ]
        return sum(weighed, torch.zeros(()))

    return scalar


def _of_module(
    called: Callable[[Mapping[str, Any]], Any],
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Mapping[str, Any],
    loss: Loss | None,
) -> LossAndGrads:
    with torch.random.fork_rng(), torch.enable_grad():
        terms = evaluate(scalar_of(loss), called(batch), batch)
        wanted = {path: leaf for path, leaf in params.items() if leaf.requires_grad}
        if not terms.sum.requires_grad:
            return LossAndGrads(terms.sum / terms.weight, dict.fromkeys(wanted), buffers)
        grads = torch.autograd.grad(terms.sum, list(wanted.values()), allow_unused=True)
    dense = (grad if grad is None or grad.layout is torch.strided else grad.to_dense() for grad in grads)
    return LossAndGrads(terms.sum.detach() / terms.weight, dict(zip(wanted, dense, strict=True)), buffers)


def _stages(model: Model) -> list[Stage]:
    try:
        return split(model, 2)
    except SplitError:  # it can be split in one place only
        return split(model, 1)


def _of_stages(
    stages: Sequence[Stage], params: Mapping[str, Tensor], batch: Mapping[str, Any], loss: Loss | None
) -> LossAndGrads:
    """Run one batch through the stages, forward and backward."""
    model = stages[0].model
    device = model.device
    contexts, _ = follow(
        stages, params, batch, scalar_of(loss), device=device, returned_by=lambda context: captured(context).returned
    )
    microbatch, given, ran = Microbatch.of(batch), list[Tensor](), []
    kept = model.init_state_paths(None, device)
    with torch.no_grad():
        for context in contexts:
            functions = GraphStage(captured(context), context)
            functions.make((Kind.F, Kind.B))
            leaves = [params[model.canonical(path)] for path in context.stage.holders]
            state = [kept[path] for path in context.stage.states]
            produced, residuals = functions.forward(functions.bind(leaves), state, given, microbatch)
            given = produced.outputs
            kept.update(zip(context.stage.states, produced.state, strict=True))
            ran.append((context, functions, residuals))
        cotangents: list[Tensor] = []
        grads: dict[str, Tensor | None] = {}
        for context, functions, residuals in reversed(ran):
            sums = Accumulator(context.accumulator_layouts, context.device)
            cotangents = functions.backward(residuals, cotangents, sums)
            for path, grad in zip(context.stage.trainable_holders, sums.sums, strict=True):
                known = grads.get(model.canonical(path))
                grads[model.canonical(path)] = grad if known is None else known + grad
    assert produced.sum is not None and produced.weight is not None
    every = {path: grads.get(path) for path, leaf in params.items() if leaf.requires_grad}
    return LossAndGrads(produced.sum / produced.weight, every, kept)


def close(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors match up to 0.3 times the root of the dtype's eps, relative to the largest value."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.numel():
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    one, other = one.detach(), other.detach()
    finite = other.abs()[other.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    tolerance = 0.3 * torch.finfo(one.dtype).eps ** 0.5 * max(scale, 1e-6)
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
