"""Recurrent layers: without fused kernels, and layer by layer where there is dropout between layers.

On CPUs, the fused LSTM keeps a workspace that no graph can pass to its backward. A GRU runs other operators on fake tensors
than on real ones, so an engine that traces it would give other bits than one that runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autofunc import random
from autofunc.graph.schema import arguments

_aten = torch.ops.aten
_LSTM = (_aten.lstm.input, _aten.lstm.data)
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""Names of the recurrent operators."""


def lstm(*args: Any) -> Any:
    """Run `aten.lstm` without oneDNN."""
    with torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None):
        return _aten.lstm(*args)


def gru(
    x: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run `aten.gru` without dropout; on CPUs by its equations."""
    if x.device.type != "cpu":
        made: tuple[Tensor, Tensor] = _aten.gru(
            x, hx, params, has_biases, num_layers, 0.0, train, bidirectional, batch_first
        )
        return made
    x = x.transpose(0, 1) if batch_first else x
    each, directions = 4 if has_biases else 2, 2 if bidirectional else 1
    last: list[Tensor] = []
    for layer in range(num_layers):
        made_by = []
        for direction in range(directions):
            number = layer * directions + direction
            states = _gru_steps(x, hx[number], params[number * each : (number + 1) * each], backwards=direction == 1)
            last.append(states[0 if direction else -1])
            made_by.append(torch.stack(states))
        x = made_by[0] if directions == 1 else torch.cat(made_by, -1)
    return x.transpose(0, 1) if batch_first else x, torch.stack(last)


def _gru_steps(x: Tensor, h: Tensor, params: Sequence[Tensor], *, backwards: bool) -> list[Tensor]:
    """Return the state after each step, in the order of the sequence."""
    linear = torch.nn.functional.linear
    inputs, hidden, *biases = params
    input_bias, hidden_bias = biases or (None, None)
    steps = list(linear(x, inputs, input_bias).unbind())
    states = []
    for gates in reversed(steps) if backwards else steps:
        own_reset, own_update, own_new = gates.chunk(3, -1)
        reset, update, new = linear(h, hidden, hidden_bias).chunk(3, -1)
        reset, update = torch.sigmoid(own_reset + reset), torch.sigmoid(own_update + update)
        new = torch.tanh(own_new + new * reset)
        h = (h - new) * update + new
        states.append(h)
    return states[::-1] if backwards else states


def unfuse(graph: fx.Graph) -> None:
    """Replace fused operators in a graph, in place."""
    for node in graph.nodes:
        if node.target in _LSTM:
            node.target = lstm
        elif node.target is _aten.gru.input:
            node.target = gru


def recurrent_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the first arguments of `layer_by_layer` for a node that calls a recurrent operator."""
    given = arguments(node)
    packed = [given["data"], given["batch_sizes"]] if "data" in given else [given["input"]]
    names = ("hx", "params", "has_biases", "num_layers", "dropout", "bidirectional")
    return (packed, *(given[name] for name in names), given.get("batch_first", False))


def layer_by_layer(
    kind: str, given: Sequence[Tensor], hx: Any, params: Sequence[Tensor], has_biases: bool, num_layers: int, p: float,
    bidirectional: bool, batch_first: bool, key: Tensor | None, name: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run a recurrent operator with dropout between layers as a function of (key, name); without a key, no dropout.

    Args:
        kind: one of `RECURRENT`.
        given: its input; for a packed sequence, the data and the batch sizes.
        hx: the initial state of all layers; for an LSTM a list of two.
        params: those of all layers, in order.
        has_biases, num_layers, bidirectional, batch_first: as for the operator; batch_first is unused for packed sequences.
        p: probability of zeroing an element between one layer and the next.
        key: the microbatch's, or None.
        name: the call's, unique in the model.
    """
    operator: Any = getattr(_aten, kind)
    if kind == "lstm" or (kind == "gru" and len(given) == 1):
        operator = lstm if kind == "lstm" else gru

    def run(given: Sequence[Tensor], hx: Any, params: Sequence[Tensor], count: int) -> Any:
        last = [batch_first] if len(given) == 1 else []
        return operator(*given, hx, params, has_biases, count, 0.0, True, bidirectional, *last)

    if key is None:
        return tuple(run(given, hx, params, num_layers))
    each, directions = len(params) // num_layers, 2 if bidirectional else 1
    states: list[Sequence[Tensor]] = []
    for layer in range(num_layers):
        rows = slice(layer * directions, (layer + 1) * directions)
        own = [state[rows] for state in hx] if kind == "lstm" else hx[rows]
        x, *state = run(given, own, params[layer * each : (layer + 1) * each], 1)
        states.append(state)
        if layer < num_layers - 1:
            x = random.dropout(x, p, {"key": random.fold_in(key, layer)}, name)
        given = [x, *given[1:]]
    return (given[0], *(torch.cat(parts) for parts in zip(*states, strict=True)))
