"""The oracle: the plain microbatch loop, on one process, without a pipeline. Every pipelined run is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict

from autofunc import tree
from autofunc.batch import split_batch
from autofunc.errors import BatchError
from autofunc.losses import NO_WEIGHT, Loss, combine_aux, evaluate
from autofunc.model import Model
from autofunc.row_dims import BatchDims


def reference_value_and_grad(
    model: Model,
    loss: Loss | None,
    num_microbatches: int,
    *,
    has_aux: bool = False,
    has_state: bool = False,
    batch_dims: BatchDims = None,
) -> Callable[..., tuple[Any, TensorDict]]:
    """Return a function that computes loss and gradients by a loop over microbatches.

    Each microbatch's loss sum has cotangent 1. Gradients are added in microbatch order, in fp32 for parameters of lower
    precision. A tied parameter is one leaf per holder, and its holders are summed in path order. At the end everything is
    divided by the total weight.

    Args:
        model: the whole model.
        loss: see `autofunc.losses`; None uses the output's own loss.
        num_microbatches: number of pieces to cut the batch into.
        has_aux: also return the combined auxiliary outputs.
        has_state: also take and return the state of layers, see `af.value_and_grad`.
        batch_dims: see `af.pipeline`.

    Returns:
        `f(params, batch, key=None, state=None) -> (loss, grads)`; `loss` becomes `(loss, aux)` with `has_aux`,
        `(loss, state)` with `has_state`, and `(loss, aux, state)` with both. `loss` is 0-dim fp32.

    Raises:
        BatchError: from `f`, if the number of microbatches does not divide the rows, or the total weight is 0.
        ModelError: from `f`, if a parameter or state is missing.
    """

    def value_and_grad(
        params: tree.Nested, batch: Mapping[str, Any], key: Any = None, state: tree.Nested | None = None
    ) -> tuple[Any, TensorDict]:
        flat = tree.flatten(params)
        leaves = {path: model.lookup(flat, path).detach().requires_grad_(model.is_trainable(path)) for path in model.spec}
        trainable = {path: leaf for path, leaf in leaves.items() if leaf.requires_grad}
        by_layer = model.layer_trees(leaves)
        dtypes = {path: leaf.dtype for path, leaf in flat.items()}
        sums: dict[str, torch.Tensor] = {}
        total, weight = torch.zeros(()), torch.zeros(())
        collected = []
        states = model.state_trees({} if state is None else tree.flatten(state))
        for microbatch in split_batch(batch, num_microbatches, key=key, batch_dims=batch_dims, key_name=model.key_name):
            specialised = model.specialise(microbatch, dtypes)
            with torch.enable_grad():
                outputs, states = specialised.run(list(model.layers), by_layer, None, microbatch, states)
                terms = evaluate(loss, outputs, microbatch)
            grads = torch.autograd.grad(terms.sum, list(trainable.values()), allow_unused=True)
            for path, grad in zip(trainable, grads, strict=True):
                if grad is not None:
                    wide = grad.float() if grad.dtype.itemsize < 4 else grad
                    sums[path] = sums[path] + wide if path in sums else wide
            total, weight = total.to(terms.sum.device) + terms.sum.detach().float(), weight.to(terms.weight) + terms.weight
            collected.append(terms.aux)
        merged: dict[str, torch.Tensor] = {}
        for path, leaf in trainable.items():  # in path order
            part = sums.get(path, torch.zeros_like(leaf))
            canonical = model.canonical(path)
            merged[canonical] = merged[canonical] + part if canonical in merged else part
        if weight == 0:
            raise BatchError(NO_WEIGHT)
        mean = total / weight
        tree_of_grads = tree.to_tensordict({path: (s / weight).to(flat[path].dtype) for path, s in merged.items()})
        values: list[Any] = [mean]
        if has_aux:
            values.append(combine_aux(loss, collected))
        if has_state:
            values.append(tree.to_tensordict(model.flat_state(states)))
        return (values[0] if len(values) == 1 else tuple(values)), tree_of_grads

    return value_and_grad
