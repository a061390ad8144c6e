"""The cost of layers, for balancing stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from autofunc import tree
from autofunc.experts import PRODUCTS, product_work
from autofunc.fake import fake_mode, naming_errors
from autofunc.losses import Loss, evaluate
from autofunc.model import Model
from autofunc.splitting.context import StageContext, specialise
from autofunc.splitting.infer import fake_arguments, parameter_dtypes
from autofunc.splitting.setting import ALONE, Setting
from autofunc.splitting.stage import Stage

OPERATIONS_PER_NUMBER = 80
"""How many operations of a matrix product take as long as one number of an elementwise operator: measured on a CPU core,
where elementwise operators are bound by memory."""

_PASSES = {"_softmax": 4, "_log_softmax": 4}
"""Operators that pass over their numbers more than once."""

_ELEMENTWISE = (
    "add", "sub", "mul", "div", "neg", "pow", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "silu",
    "gelu", "relu", "where", "masked_fill", "maximum", "minimum", "clamp", "_softmax", "_log_softmax", "nll_loss_forward",
    "_to_copy", "native_layer_norm", "native_group_norm", "_fused_rms_norm", "mean", "sum", "var", "var_mean", "cumsum",
    "cat", "clone", "copy_", "embedding", "index", "gather", "repeat", "topk", "sort", "argmax", "erf", "square",
    "reciprocal", "abs", "stack",
)  # fmt: skip
"""Operators counted by the numbers they write."""

_MOVED = ("copied_rows", "permuted_rows")
"""The same, for operators of our own."""


@dataclass(frozen=True)
class LayerCost:
    """The work of one layer for one microbatch."""

    flops: int  # of products, convolutions and attention in its forward
    numbers: int  # written by the other operators of its forward, once for each write
    gradients: int  # numbers in its weights' gradients

    @property
    def forward(self) -> float:
        """The forward, in floating-point operations of a product."""
        return float(self.flops + OPERATIONS_PER_NUMBER * self.numbers)

    @property
    def backward(self) -> float:
        """Twice the forward, plus the gradients, which are written and added to their sums for every microbatch."""
        return 2 * self.forward + 2 * OPERATIONS_PER_NUMBER * self.gradients


def layer_costs(model: Model, batch: Mapping[str, Any] | None = None, loss: Loss | None = None) -> dict[str, float]:
    """Return each layer's cost, by its name: for `af.split(model, number, costs=...)`.

    With a batch, the layers run on fake tensors and their operations are counted: those of products, and for all other
    operators the numbers written. The loss counts as part of the last layer. A backward is assumed to cost twice as much,
    plus two numbers for each of the layer's weights: for a table of 50,000 words that is more than the lookup.

    Without a batch, the estimate uses shapes alone: the elements of a layer's weights with two or more dims. A matrix of n
    elements takes about 2n floating-point operations per row. A lookup in a table takes none, but shapes cannot tell a
    table from a matrix; so the first layer, which sees only the batch, counts as free. Tied weights count in every layer
    that uses them.

    Args:
        model: the model.
        batch: one microbatch; only shapes and dtypes matter.
        loss: added to the last layer.
    """
    if batch is not None:
        return {name: each.forward + each.backward for name, each in count_operations(model, batch, loss).items()}
    costs = dict.fromkeys(model.layers, 0.0)
    for path, leaf in model.spec.items():
        name = model.layer_of(path)
        if name is not None and leaf.dim() >= 2:
            costs[name] += leaf.numel()
    costs[next(iter(costs))] = 0.0
    return costs


def count_operations(
    model: Model, batch: Mapping[str, Any], loss: Loss | None = None, setting: Setting = ALONE
) -> dict[str, LayerCost]:
    """Count each layer's work for one microbatch, by its name, on fake tensors.

    Args:
        model: the model.
        batch: one microbatch.
        loss: added to the last layer; None leaves it out.
        setting: the surroundings of the layers; its precision matters.
    """
    whole = Stage(model, 0, tuple(model.layers))
    batch = {model.key_name: None, **model.with_needed_key(batch)}
    specialised, dtypes = specialise(model, parameter_dtypes(model, {}), batch, setting)
    context = StageContext(whole, specialised, None, loss, True, True, dtypes, batch, torch.device("cpu"), setting)
    found: dict[str, LayerCost] = {}
    with fake_mode() as mode, torch.no_grad(), naming_errors("the model"):
        bound, _, microbatch = fake_arguments(context, mode)
        entries = specialised.share(whole.layers, setting.precision.batch(microbatch))
        x: Any = None
        states: Any = whole.bind_state(context.empty_state())
        for name in whole.layers:
            with _Counter() as counter:
                x, _ = specialised.layer(name, bound[name], x, entries, states)
                if name == whole.layers[-1] and loss is not None:
                    evaluate(loss, x, microbatch)
            trained = sum(model.spec[path].numel() for path in whole.trainable_holders if model.layer_of(path) == name)
            found[name] = LayerCost(counter.flops, counter.numbers, trained)
    return found


class _Counter:
    """Counts the operations of everything that runs inside."""

    def __init__(self) -> None:
        self.numbers = 0
        packets = {name: getattr(torch.ops.aten, name, None) for name in _ELEMENTWISE}
        packets |= {name: getattr(torch.ops.autofunc, name) for name in _MOVED}
        counted = {packet: partial(self._write, _PASSES.get(name, 1)) for name, packet in packets.items() if packet}
        products = {product.overloadpacket: _grouped for product in PRODUCTS}
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # torch counts only GPUs'
        self._mode = FlopCounterMode(display=False, custom_mapping={**counted, **products, **attention})

    def _write(self, passes: int, *shapes: Any, out_shape: Any = None, **options: Any) -> int:
        first = out_shape[0] if out_shape and isinstance(out_shape[0], (tuple, list, torch.Size)) else out_shape
        self.numbers += passes * int(torch.Size(first or ()).numel())
        return 0

    def __enter__(self) -> _Counter:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def flops(self) -> int:
        return int(self._mode.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _grouped(rows: Any, other: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return 2 * product_work(rows, other)


def parameter_count(model: Model, paths: list[str] | None = None) -> int:
    """Return the number of distinct parameters (tied ones once), of all paths or of some."""
    chosen = {model.canonical(path) for path in (model.spec if paths is None else paths)}
    return sum(model.spec[path].numel() for path in sorted(chosen, key=tree.split_path))


def imbalance(stages: Sequence[Stage], costs: Mapping[str, float]) -> float:
    """Return the cost of the costliest stage divided by the mean: 1 is even."""
    sums = [sum(costs[name] for name in stage.layers) for stage in stages]
    return max(sums) * len(sums) / sum(sums) if sum(sums) else 1.0
