"""What layers cost on this machine, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.losses import Loss, evaluate
from autofunc.model import Model


def measure_layers(
    model: Model, params: tree.Nested, batch: Mapping[str, Any], loss: Loss | None, repeats: int = 5,
    on_progress: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Time each layer by itself, with autograd: (forward_ms, backward_ms) by name, medians.

    A backward ends with the weight gradients added to their sums. The last layer is timed with the loss. Layers run with as
    many threads as torch has in this process.

    Args:
        model: the model.
        params: all of its parameters, with real values.
        batch: one microbatch.
        loss: see `af.pipeline`; None uses the output's own.
        repeats: of each, after one that does not count.
        on_progress: told the name of each layer when it is done.
    """
    flat, batch = tree.flatten(params), model.with_needed_key(batch)
    specialised = model.specialise(batch, {path: leaf.dtype for path, leaf in flat.items()})
    leaves = {path: model.lookup(flat, path).detach().requires_grad_(model.is_trainable(path)) for path in model.spec}
    by_layer = model.layer_trees(leaves)
    entries = specialised.share(list(model.layers), batch)
    states = model.state_trees(model.init_state_paths(None, _device(leaves)))
    found, x = {}, None
    for name in model.layers:
        own = [leaf for path, leaf in leaves.items() if model.layer_of(path) == name and leaf.requires_grad]
        sums = [torch.zeros_like(leaf) for leaf in own]
        forward, backward = [], []
        for _ in range(repeats + 1):
            given = tree.map_leaves(_leaf, x)
            received = [leaf for leaf in tree.leaves_and_spec(given)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
            start = time.perf_counter()
            with torch.enable_grad():
                made, _ = specialised.layer(name, by_layer[name], given, entries, states)
                returned = evaluate(loss, made, batch).sum if name == next(reversed(model.layers)) else made
            middle = time.perf_counter()
            roots = [leaf for leaf in tree.leaves_and_spec(returned)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
            if roots and (own or received):
                seeds = [torch.ones_like(root) for root in roots]
                grads = torch.autograd.grad(roots, [*own, *received], seeds, allow_unused=True)
                for total, grad in zip(sums, grads, strict=False):
                    if grad is not None:
                        total += grad
            forward.append((middle - start) * 1e3)
            backward.append((time.perf_counter() - middle) * 1e3)
        found[name] = median(forward[1:]), median(backward[1:])
        on_progress(name)
        x = made
    return found


def _device(leaves: Mapping[str, Tensor]) -> torch.device:
    return next((leaf.device for leaf in leaves.values()), torch.device("cpu"))


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
