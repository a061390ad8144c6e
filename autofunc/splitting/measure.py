"""Measured costs of layers on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.losses import Loss, evaluate
from autofunc.model import Model
from autofunc.splitting.boundary import Value
from autofunc.splitting.cut import split
from autofunc.splitting.infer import infer_boundaries


def measure_layers(
    model: Model, params: tree.Nested, batch: Mapping[str, Any], loss: Loss | None, repeats: int = 5,
    on_progress: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Time each layer alone, with autograd: (forward_ms, backward_ms) by name, medians.

    The backward includes adding the weight gradients to their accumulators. The last layer is timed with the loss. Layers
    run with as many threads as torch has in this process.

    Args:
        model: the model.
        params: all of its parameters, with real values.
        batch: one microbatch.
        loss: see `af.pipeline`; None uses the output's own.
        repeats: timed runs of each layer, after one warm-up.
        on_progress: called with each layer's name when it is done.
    """
    flat, batch = tree.flatten(params), model.with_needed_key(batch)
    specialised = model.specialise(batch, {path: leaf.dtype for path, leaf in flat.items()})
    leaves = {path: model.lookup(flat, path).detach().requires_grad_(model.is_trainable(path)) for path in model.spec}
    by_layer = model.layer_trees(leaves)
    entries = specialised.share(list(model.layers), batch)
    states = model.state_trees(model.init_state_paths(None, _device(leaves)))
    found, x, last = {}, None, next(reversed(model.layers))
    for name in model.layers:
        own = [leaf for path, leaf in leaves.items() if model.layer_of(path) == name and leaf.requires_grad]

        def run(given: Any, name: str = name) -> tuple[Any, Any]:
            made, _ = specialised.layer(name, by_layer[name], given, entries, states)
            return made, evaluate(loss, made, batch).sum if name == last else made

        x, *found[name] = _timed(run, own, x, repeats)
        on_progress(name)
    return {name: (forward, backward) for name, (forward, backward) in found.items()}


def measure_layer(
    model: Model, name: str, batch: Mapping[str, Any], loss: Loss | None, repeats: int = 5
) -> tuple[float, float]:  # fmt: skip
    """Time one layer as `measure_layers` does, but with only its own weights, and made-up inputs.

    Args:
        model: the model; it may have no weights.
        name: the layer to time.
        batch: one microbatch.
        loss: see `af.pipeline`; None uses the output's own.
        repeats: timed runs, after one warm-up.
    """
    batch = model.with_needed_key(batch)
    holders = [path for path in model.spec if model.layer_of(path) == name]
    values = model.init_paths(holders, 0, model.device)
    leaves = {path: model.lookup(values, path).detach().requires_grad_(model.is_trainable(path)) for path in holders}
    specialised = model.specialise(batch, {path: leaf.dtype for path, leaf in values.items()})
    bound = model.layer_trees(leaves)[name]
    entries, states = specialised.share([name], batch), model.state_trees(model.init_state_paths(None, model.device))
    is_last = name == next(reversed(model.layers))

    def run(given: Any) -> tuple[Any, Any]:
        made, _ = specialised.layer(name, bound, given, entries, states)
        return made, evaluate(loss, made, batch).sum if is_last else made

    x = None
    if name != next(iter(model.layers)):
        boundary = infer_boundaries(split(model, [name]), {}, batch, loss).stages[0]
        x = boundary.assemble([_made_up(value, model.device) for value in boundary.values])
    _, forward, backward = _timed(run, [leaf for leaf in leaves.values() if leaf.requires_grad], x, repeats)
    return forward, backward


def _timed(run: Callable[[Any], tuple[Any, Any]], own: Sequence[Tensor], x: Any, repeats: int) -> tuple[Any, float, float]:
    """Return a layer's output, and the milliseconds of its forward and its backward.

    Args:
        run: returns the output, and what to differentiate.
        own: the layer's trainable parameters.
        x: its input.
        repeats: timed runs, after one warm-up.
    """
    sums = [torch.zeros_like(leaf) for leaf in own]
    forward, backward = [], []
    for _ in range(repeats + 1):
        given = tree.map_leaves(_leaf, x)
        received = [leaf for leaf in tree.leaves_and_spec(given)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
        start = time.perf_counter()
        with torch.enable_grad():
            made, returned = run(given)
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
    return made, median(forward[1:]), median(backward[1:])


def _made_up(value: Value, device: torch.device) -> Tensor:
    leaf = torch.zeros(value.shape, dtype=value.dtype, device=device)
    return (leaf.normal_() if leaf.is_floating_point() else leaf).requires_grad_(value.needs_grad)


def _device(leaves: Mapping[str, Tensor]) -> torch.device:
    return next((leaf.device for leaf in leaves.values()), torch.device("cpu"))


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
